"""Rotary embedding, attention of one head, and the gate of the feed-forward, in numpy_ref's order."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from bitnet_mlx.backends.cpu_jit.emit import Builder, Value, at, const, f32, i64, load, loop, pointer, splat, store, vector
from bitnet_mlx.backends.cpu_jit.floats import ONE, OPTIONS, ZERO, apart, dot, exp, floats, lane_total

LOWEST = np.float32(-np.inf)


def _mix(width: int) -> Any:
    """numba intrinsic (values, weights, positions, stride, z, out): out[width] = (sum over positions of e * v) / z."""

    @intrinsic
    def mix(typing: Any, values: Any, weights: Any, positions: Any, stride: Any, z: Any, out: Any) -> Any:
        kind = vector(f32, width)

        def build(context: Any, b: Builder, signature: Any, args: Any) -> Value:
            values, weights, positions, stride, z, out = args
            values, weights, out = pointer(b, values), pointer(b, weights), pointer(b, out)

            def add(t: Value, total: list[Value]) -> list[Value]:
                e = splat(b, load(b, at(b, weights, b.shl(t, const(i64, 2))), f32), width)
                return [b.fadd(total[0], b.fmul(e, load(b, at(b, values, b.mul(t, stride)), kind)))]

            (total,) = loop(b, positions, [const(kind, 0)], add)
            store(b, b.fdiv(total, splat(b, z, width)), out)
            return context.get_dummy_value()

        int64 = types.int64
        return types.void(int64, int64, int64, int64, types.float32, int64), build

    return mix


mix_64, mix_8, mix_1 = _mix(64), _mix(8), _mix(1)


@njit(**OPTIONS)
def attend(q, keys, values, positions, dim, scale, scores, out):
    """One query head at address q over `positions` rows of keys and values [positions, dim]; scores: room for them."""
    apart()
    e = floats(scores)
    stride = dim * 4
    top = LOWEST
    for t in range(positions):
        score = dot(q, keys + t * stride, dim) * scale
        e[t] = score
        top = score if score > top else top
    for t in range(positions):
        e[t] = exp(e[t] - top)
    z = lane_total(scores, positions)
    d = 0
    while d + 64 <= dim:
        mix_64(values + d * 4, scores, positions, stride, z, out + d * 4)
        d += 64
    while d + 8 <= dim:
        mix_8(values + d * 4, scores, positions, stride, z, out + d * 4)
        d += 8
    while d < dim:
        mix_1(values + d * 4, scores, positions, stride, z, out + d * 4)
        d += 1


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
