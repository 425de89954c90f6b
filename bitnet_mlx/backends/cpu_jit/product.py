"""The exact ternary product on packed rows, the same text for every body (avx2, plain, arm64).

A row of words2 is a run of blocks, 32 bytes for 128 codes: byte j holds codes 4 j .. 4 j + 3, so plane p of a block
(its bytes shifted by 2 p) faces the activations 4 j + p. Activations are therefore kept in planes:

  one token at a time   [M, blocks, 4, 32]
  panels of 8 tokens    [ceil(M / 8), blocks, 8, 4, 32]

Codes are t + 1, so the accumulator is the sum of code * q less the sum of q.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from numba import types
from numba.extending import intrinsic

from bitnet_mlx.backends.cpu_jit import isa
from bitnet_mlx.backends.cpu_jit.emit import (
    Builder,
    Value,
    at,
    const,
    i8,
    i32,
    i64,
    load,
    loop,
    pointer,
    prefetch,
    shuffle,
    store,
    vector,
)

PANEL = 8  # tokens of a panel
BLOCK = 128  # codes of a block
BLOCK_BYTES = 32
AHEAD = 8192  # bytes of weights asked for in advance when a row is read once


def dots(b: Builder, body: ModuleType, w: Value, x: Value, blocks: Value, tokens: int, ahead: int) -> list[Value]:
    """Sums of code * q of one row with one token, or the first `tokens` of a panel, each still spread over the lanes of a
    wide vector.

    For one token the body may keep several narrow sums (`row_codes` names the one of each plane): the chain of additions
    is then shorter. `combine` makes one wide sum of them.
    """
    parts, stride = (body.parts, 1) if tokens == 1 else (1, PANEL)

    def block(i: Value, sums: list[Value]) -> list[Value]:
        here, facing = at(b, w, b.mul(i, const(i64, BLOCK_BYTES))), at(b, x, b.mul(i, const(i64, BLOCK * stride)))
        if ahead:
            prefetch(b, at(b, here, ahead))
        for piece in range(0, BLOCK_BYTES, body.width):
            packed = load(b, at(b, here, piece), vector(i8, body.width))
            for plane in range(4):
                code, part = body.row_codes(b, packed, plane) if parts > 1 else (body.codes(b, packed, plane), 0)
                for t in range(tokens):
                    q = load(b, at(b, facing, t * BLOCK + plane * 32 + piece), vector(i8, body.width))
                    sums[t * parts + part] = body.multiply_add(b, sums[t * parts + part], code, q)
        return sums

    def chunk(c: Value, totals: list[Value]) -> list[Value]:
        first = b.mul(c, const(i64, body.limit))
        left = b.sub(blocks, first)
        count = b.select(b.icmp_signed("<", left, const(i64, body.limit)), left, const(i64, body.limit))
        zero = [const(body.narrow, 0)] * (tokens * parts)
        sums = loop(b, count, zero, lambda i, v: block(b.add(first, i), v))
        if parts > 1:
            return [body.combine(b, totals[0], sums)]
        return [body.widen(b, total, part) for total, part in zip(totals, sums, strict=True)]

    chunks = b.sdiv(b.add(blocks, const(i64, body.limit - 1)), const(i64, body.limit))
    return loop(b, chunks, [const(body.wide, 0)] * tokens, chunk)


def lane_totals(b: Builder, vectors: list[Value]) -> Value:
    """L vectors of L integers -> one vector whose lane n is the sum of vector n."""
    count, step = len(vectors), 1
    while len(vectors) > 1:
        even, odd = [], []
        for lane in range(count):
            second = lane // step % 2  # lanes of the pair's second vector
            even.append(lane - step + count if second else lane)
            odd.append(lane + count if second else lane + step)
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [b.add(shuffle(b, x, y, even), shuffle(b, x, y, odd)) for x, y in pairs]
        step *= 2
    return vectors[0]


def lane_total(b: Builder, v: Value) -> Value:
    """The sum of an integer vector's lanes."""
    count = v.type.count
    while count > 1:
        count //= 2
        v = b.add(shuffle(b, v, v, range(count)), shuffle(b, v, v, range(count, 2 * count)))
    return b.extract_element(v, const(i32, 0))


def emit_row(b: Builder, body: ModuleType, w: Value, x: Value, blocks: Value) -> Value:
    """i32: one row, one token, the row read once from memory."""
    return lane_total(b, dots(b, body, pointer(b, w), pointer(b, x), blocks, 1, AHEAD)[0])


def emit_panel(
    b: Builder, body: ModuleType, w: Value, x: Value, blocks: Value, out: Value, tokens: int = PANEL
) -> None:
    """out[8] (int32) += one row with the first 2, 4 or 8 tokens of a panel; few tokens are bound by reading the row."""
    totals = dots(b, body, pointer(b, w), pointer(b, x), blocks, tokens, 0 if tokens == PANEL else AHEAD)
    out = pointer(b, out)
    lanes = body.wide.count
    totals += [const(body.wide, 0)] * (-tokens % lanes)
    for first in range(0, len(totals), lanes):
        here = at(b, out, 4 * first)
        store(b, b.add(load(b, here, body.wide, 4), lane_totals(b, totals[first : first + lanes])), here, 4)


def row_intrinsic(choose: Callable[[], ModuleType]) -> Any:
    """numba intrinsic int32 (weights, activations, blocks); addresses are int64. `choose` names the body at compile time."""

    @intrinsic
    def row_product(typing: Any, w: Any, x: Any, blocks: Any) -> Any:
        def build(context: Any, b: Builder, signature: Any, args: Any) -> Value:
            return emit_row(b, choose(), *args)

        return types.int32(types.int64, types.int64, types.int64), build

    return row_product


def panel_intrinsic(choose: Callable[[], ModuleType], tokens: int = PANEL) -> Any:
    """numba intrinsic void (weights, activations, blocks, out)."""

    @intrinsic
    def panel_product(typing: Any, w: Any, x: Any, blocks: Any, out: Any) -> Any:
        def build(context: Any, b: Builder, signature: Any, args: Any) -> Value:
            emit_panel(b, choose(), *args, tokens)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64, types.int64), build

    return panel_product


row_product = row_intrinsic(isa.body)
panel_product, product_of_4, product_of_2 = (panel_intrinsic(isa.body, tokens) for tokens in (PANEL, 4, 2))
