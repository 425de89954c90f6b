"""Rotary embedding, attention of one head, and the gate of the feed-forward, in numpy_ref's order."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from bitnet_mlx.backends.cpu_jit.emit import Builder, Value, at, const, f32, i64, load, loop, pointer, splat, store, vector
from bitnet_mlx.backends.cpu_jit.floats import ONE, OPTIONS, ZERO, apart, dot, exp, floats, lane_total

LOWEST = np.float32(-np.inf)
RUN = 48  # positions at a time: 24 KB of keys at 128 floats a head


def _mix(width: int) -> Any:
    """numba intrinsic (values, weights, positions, stride, out): out[width] += the sum over positions of e * v."""

    @intrinsic
    def mix(typing: Any, values: Any, weights: Any, positions: Any, stride: Any, out: Any) -> Any:
        kind = vector(f32, width)

        def build(context: Any, b: Builder, signature: Any, args: Any) -> Value:
            values, weights, positions, stride, out = args
            values, weights, out = pointer(b, values), pointer(b, weights), pointer(b, out)

            def add(t: Value, total: list[Value]) -> list[Value]:
                e = splat(b, load(b, at(b, weights, b.shl(t, const(i64, 2))), f32), width)
                return [b.fadd(total[0], b.fmul(e, load(b, at(b, values, b.mul(t, stride)), kind)))]

            (total,) = loop(b, positions, [load(b, out, kind)], add)
            store(b, total, out)
            return context.get_dummy_value()

        int64 = types.int64
        return types.void(int64, int64, int64, int64, int64), build

    return mix


mix_64, mix_8, mix_1 = _mix(64), _mix(8), _mix(1)


@njit(**OPTIONS)
def mix_rows(values, scores, positions, dim, out):
    """out[dim] += the sum over positions, ascending, of e * v; `dim` in pieces that stay in registers."""
    d, stride = 0, dim * 4
    while d + 64 <= dim:
        mix_64(values + d * 4, scores, positions, stride, out + d * 4)
        d += 64
    while d + 8 <= dim:
        mix_8(values + d * 4, scores, positions, stride, out + d * 4)
        d += 8
    while d < dim:
        mix_1(values + d * 4, scores, positions, stride, out + d * 4)
        d += 1


@njit(**OPTIONS)
def attend(q, team, keys, values, positions, dim, scale, scores, out):
    """`team` query heads [team, dim] on the same keys and values [positions, dim]; out like q.

    Positions are taken in runs that the first-level cache holds, so that the team reads them once from memory.
    scores: room for team * positions floats.
    """
    apart()
    e, y, size = floats(scores), floats(out), dim * 4
    for t0 in range(0, positions, RUN):
        for h in range(team):
            for t in range(t0, min(t0 + RUN, positions)):
                e[h * positions + t] = dot(q + h * size, keys + t * size, dim) * scale
    for h in range(team):
        top = LOWEST
        for t in range(h * positions, (h + 1) * positions):
            top = e[t] if e[t] > top else top
        for t in range(h * positions, (h + 1) * positions):
            e[t] = exp(e[t] - top)
    for d in range(team * dim):
        y[d] = ZERO
    for t0 in range(0, positions, RUN):
        for h in range(team):
            here = scores + (h * positions + t0) * 4
            mix_rows(values + t0 * size, here, min(RUN, positions - t0), dim, out + h * size)
    for h in range(team):
        z = lane_total(scores + h * positions * 4, positions)
        for d in range(h * dim, (h + 1) * dim):
            y[d] = y[d] / z


@njit(**OPTIONS)
def rotate(x, cos, sin, half, out):
    """One head's halves turned: x [2 * half] to out, which may be x."""
    apart()
    source, c, s, y = floats(x), floats(cos), floats(sin), floats(out)
    for j in range(half):
        a, b = source[j], source[j + half]
        y[j] = a * c[j] - b * s[j]
        y[j + half] = b * c[j] + a * s[j]


@njit(**OPTIONS)
def gated(gate, up, count, silu):
    """gate[i] = act(gate[i]) * up[i], in place."""
    apart()
    g, u = floats(gate), floats(up)
    if silu:
        for i in range(count):
            g[i] = g[i] / (ONE + exp(-g[i])) * u[i]
    else:
        for i in range(count):
            positive = ZERO if g[i] < ZERO else g[i]  # NaN stays NaN
            g[i] = positive * positive * u[i]
