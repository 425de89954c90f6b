"""Rows of floats, or of codes with scales, times several rows of activations: each weight is read and widened once for all.

A row of activations keeps the 32 sums of floats.py, in their order, so that its bits are those of the same row alone. Eight
lanes at a time are carried through a piece of K for up to 8 rows, in registers; in between all sums lie in memory:

  sums  float32 [weight rows of a piece, 8, 32]
"""

from __future__ import annotations

from typing import Any

from numba import njit, types
from numba.extending import intrinsic

from bitnet_mlx.backends.cpu_jit import layout as at
from bitnet_mlx.backends.cpu_jit.emit import (
    Builder,
    Value,
    const,
    f32,
    i8,
    i16,
    i32,
    i64,
    load,
    loop,
    pointer,
    prefetch,
    splat,
    store,
    vector,
)
from bitnet_mlx.backends.cpu_jit.emit import at as moved
from bitnet_mlx.backends.cpu_jit.floats import OPTIONS, ZERO, apart, floats, lane_total

FROM = 4  # rows of activations from which this is faster than row by row
PANEL = 8  # rows of activations at a time
GROUP = 64  # K of a step, and of a scale
_LANES, _WIDE = 32, 8
_eight = vector(f32, _WIDE)


def _widened(b: Builder, kind: int, w: Value, first: Value | int) -> Value:
    """Eight weights from element `first` on, as floats."""
    if kind == at.GROUPED:
        return b.sitofp(b.sext(load(b, moved(b, w, first), vector(i8, _WIDE)), vector(i32, _WIDE)), _eight)
    raised = b.zext(load(b, moved(b, w, b.shl(first, const(i64, 1))), vector(i16, _WIDE)), vector(i32, _WIDE))
    return b.bitcast(b.shl(raised, const(vector(i32, _WIDE), 16)), _eight)


def _adder(kind: int, tokens: int) -> Any:
    """numba intrinsic (w, next, scales, x, stride, groups, sums): groups of one weight row added to the sums of `tokens` rows
    of x, `stride` bytes apart. next: the weights that this thread comes to later, which are asked for."""
    size = GROUP * (1 if kind == at.GROUPED else 2)

    def lanes(b: Builder, w: Value, scales: Value, rows: list[Value], groups: Value, sums: Value, lane: Value) -> None:
        places = [moved(b, sums, b.shl(b.add(lane, const(i64, t * _LANES)), const(i64, 2))) for t in range(tokens)]

        def group(g: Value, held: list[Value]) -> list[Value]:
            first = b.add(b.shl(g, const(i64, 6)), lane)
            second = b.add(first, const(i64, _LANES))
            low, high = _widened(b, kind, w, first), _widened(b, kind, w, second)
            at_low, at_high = b.shl(first, const(i64, 2)), b.shl(second, const(i64, 2))
            scale = None
            if kind == at.GROUPED:
                scale = splat(b, load(b, moved(b, scales, b.shl(g, const(i64, 2))), f32), _WIDE)
            new = []
            for total, row in zip(held, rows, strict=True):
                a = b.fmul(low, load(b, moved(b, row, at_low), _eight))
                c = b.fmul(high, load(b, moved(b, row, at_high), _eight))
                new.append(b.fadd(b.fadd(total, a), c) if scale is None else b.fadd(total, b.fmul(b.fadd(a, c), scale)))
            return new

        for place, total in zip(places, loop(b, groups, [load(b, p, _eight) for p in places], group), strict=True):
            store(b, total, place)

    @intrinsic
    def add(typing: Any, w: Any, later: Any, scales: Any, x: Any, stride: Any, groups: Any, sums: Any) -> Any:
        def build(context: Any, b: Builder, signature: Any, args: Any) -> Value:
            w, later, scales, x, stride, groups, sums = args
            w, later, scales, sums = pointer(b, w), pointer(b, later), pointer(b, scales), pointer(b, sums)
            rows = [pointer(b, b.add(x, b.mul(stride, const(i64, t)))) for t in range(tokens)]

            def ask(g: Value, _: list[Value]) -> list[Value]:
                for line in range(0, size, 64):
                    prefetch(b, moved(b, later, b.add(b.mul(g, const(i64, size)), const(i64, line))))
                return []

            loop(b, groups, [], ask)

            def chunk(i: Value, _: list[Value]) -> list[Value]:
                lanes(b, w, scales, rows, groups, sums, b.shl(i, const(i64, 3)))
                return []

            loop(b, const(i64, _LANES // _WIDE), [], chunk)
            return context.get_dummy_value()

        int64 = types.int64
        return types.void(int64, int64, int64, int64, int64, int64, int64), build

    return add


grouped_8, grouped_4 = (_adder(at.GROUPED, tokens) for tokens in (8, 4))
bfloat16_8, bfloat16_4 = (_adder(at.BFLOAT16, tokens) for tokens in (8, 4))


@njit(**OPTIONS)
def add_grouped(w, later, scales, x, stride, groups, sums, count):
    """Codes with scales, for `count` rows of x; sums of up to 8 are touched."""
    apart()
    if count > 4:
        grouped_8(w, later, scales, x, stride, groups, sums)
    else:
        grouped_4(w, later, scales, x, stride, groups, sums)


@njit(**OPTIONS)
def add_bfloat16(w, later, x, stride, groups, sums, count):
    """bfloat16 weights, likewise."""
    apart()
    if count > 4:
        bfloat16_8(w, later, w, x, stride, groups, sums)
    else:
        bfloat16_4(w, later, w, x, stride, groups, sums)


@njit(**OPTIONS)
def panel_sums(e, n0, n1, x, stride, count, sums):
    """The 32 sums of weight rows n0 .. n1 with `count` rows of x; K in pieces whose activations stay in the first-level
    cache."""
    apart()
    held = floats(sums)
    for i in range((n1 - n0) * PANEL * _LANES):
        held[i] = ZERO
    total = e[at.WIDTH] // GROUP
    size = 1 if e[at.KIND] == at.GROUPED else 2
    for g in range(0, total, at.HEAD_GROUPS):
        groups = min(at.HEAD_GROUPS, total - g)
        for n in range(n0, n1):
            w = e[at.DATA] + n * e[at.ROW_BYTES] + g * GROUP * size
            later = w + (n1 - n0) * e[at.ROW_BYTES]
            here, piece = sums + (n - n0) * PANEL * _LANES * 4, x + g * GROUP * 4
            if e[at.KIND] == at.GROUPED:
                add_grouped(w, later, e[at.SCALE] + (n * e[at.SCALE_STEP] + g) * 4, piece, stride, groups, here, count)
            else:
                add_bfloat16(w, later, piece, stride, groups, here, count)


@njit(**OPTIONS)
def panel_value(sums, n, t):
    """The sum of the 32 of weight row n of the piece and row t of the panel."""
    return lane_total(sums + (n * PANEL + t) * _LANES * 4, _LANES)
