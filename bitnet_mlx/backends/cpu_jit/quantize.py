"""int8 codes of one row of activations, written in the planes that the ternary product reads (see product.py)."""

from __future__ import annotations

from typing import Any

from numba import njit, types
from numba.extending import intrinsic

from bitnet_mlx.backends.cpu_jit import emit
from bitnet_mlx.backends.cpu_jit.emit import (
    LANES,
    Builder,
    Value,
    at,
    const,
    i8,
    i16,
    i32,
    lanes_f32,
    load,
    pointer,
    splat,
    store,
    vector,
)
from bitnet_mlx.backends.cpu_jit.floats import (
    MAGIC,
    OPTIONS,
    ZERO,
    apart,
    bytes_signed,
    floats,
    ints,
    quantiser_factors,
)
from bitnet_mlx.backends.cpu_jit.product import BLOCK, lane_total

_many = vector(i32, LANES)


def _block(b: Builder, x: Value, weight: Value | None, factor: Value, out: Value) -> Value:
    """Codes of 128 values to out[4, 32]; returns their sum. rint by MAGIC: the low byte of the sum is the code."""
    x, out, factor = pointer(b, x), pointer(b, out), splat(b, factor, LANES)
    weight = None if weight is None else pointer(b, weight)
    fours = []  # 8 words of 4 codes from each 32 values
    for first in range(0, 4 * BLOCK, 4 * LANES):
        p = load(b, at(b, x, first), lanes_f32)
        if weight is not None:
            p = b.fmul(p, load(b, at(b, weight, first), lanes_f32))
        rounded = b.fadd(b.fmul(p, factor), const(lanes_f32, float(MAGIC)))
        codes = b.trunc(b.bitcast(rounded, _many), vector(i8, LANES))
        fours.append(b.bitcast(codes, vector(i32, LANES // 4)))
    halves = [emit.shuffle(b, fours[n], fours[n + 1], range(16)) for n in (0, 2)]
    words = emit.shuffle(b, *halves, range(32))
    total = const(vector(i16, LANES), 0)
    for plane in range(4):
        codes = b.trunc(b.lshr(words, const(_many, 8 * plane)), vector(i8, LANES))
        total = b.add(total, b.sext(codes, total.type))
        store(b, codes, at(b, out, plane * 32))
    return lane_total(b, b.sext(total, _many))


@intrinsic
def quantize_block(typing: Any, x: Any, factor: Any, out: Any) -> Any:
    """Codes of x * factor; see _block."""

    def build(context: Any, b: Builder, signature: Any, args: Any) -> Value:
        return _block(b, args[0], None, args[1], args[2])

    return types.int32(types.int64, types.float32, types.int64), build


@intrinsic
def quantize_product_block(typing: Any, x: Any, weight: Any, factor: Any, out: Any) -> Any:
    """Codes of x * weight * factor; see _block."""

    def build(context: Any, b: Builder, signature: Any, args: Any) -> Value:
        return _block(b, *args)

    return types.int32(types.int64, types.int64, types.float32, types.int64), build


@intrinsic
def low_byte(typing: Any, x: Any) -> Any:
    """int8 of a float32's low byte."""

    def build(context: Any, b: Builder, signature: Any, args: Any) -> Value:
        return b.trunc(b.bitcast(args[0], i32), i8)

    return types.int8(types.float32), build


@njit(**OPTIONS)
def quantize_row(x, weight, k, eps, out, stride, sums):
    """Codes of k floats, block by block at out + block * stride; sums[block] (int32); returns s.

    weight: the norm's weight, or 0 for no norm. The last block is filled with 0.
    """
    apart()
    factor, s = quantiser_factors(x, weight, k, eps)
    total = ints(sums)
    whole = k // BLOCK
    for block in range(whole):
        step = block * BLOCK * 4
        if weight == 0:
            total[block] = quantize_block(x + step, factor, out + block * stride)
        else:
            total[block] = quantize_product_block(x + step, weight + step, factor, out + block * stride)
    if whole * BLOCK < k:
        here, source, w = bytes_signed(out + whole * stride), floats(x), floats(weight)
        part = 0
        for i in range(BLOCK):
            at_k = whole * BLOCK + i
            p = ZERO
            if at_k < k:
                p = source[at_k] if weight == 0 else source[at_k] * w[at_k]
            code = low_byte(p * factor + MAGIC)
            here[i % 4 * 32 + i // 4] = code
            part += code
        total[whole] = part
    return s
