"""The decoder's float operations, each in the order that numpy_ref fixes, so that the bits agree.

Sums are emitted as vector IR with 32 lanes (see emit.py); element-wise work is plain loops, which LLVM vectorises
without changing a value. Addresses are int64; buffers of ours are padded with zeros to a multiple of 128 elements.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from bitnet_mlx.backends.cpu_jit import emit
from bitnet_mlx.backends.cpu_jit.emit import (
    LANES,
    Builder,
    Value,
    at,
    const,
    declare,
    f32,
    i8,
    i16,
    i32,
    i64,
    lane_sum,
    lanes_f32,
    load,
    loop,
    pointer,
    splat,
    store,
    vector,
)
from bitnet_mlx.backends.numpy_ref import EXP_HIGH, EXP_LOW, EXP_POLYNOMIAL, LN2_HIGH, LN2_LOW, LOG2E
from bitnet_mlx.ternary import MIN_SCALE

# x + MAGIC - MAGIC is rint(x) for |x| < 2^22: the sum's unit in the last place is 1. Its low byte is the integer's.
MAGIC = np.float32(12582912.0)
ONE, ZERO, TOP = np.float32(1), np.float32(0), np.float32(127)
P0, P1, P2, P3, P4, P5 = EXP_POLYNOMIAL
# Division by zero gives infinity, as in numpy. Functions are only called from compiled code: no wrappers for Python.
OPTIONS: dict[str, Any] = {"error_model": "numpy", "nogil": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def cast(kind: Any) -> Any:
    """numba intrinsic: an int64 address as a typed pointer, p[i]."""

    @intrinsic
    def view(typing: Any, address: Any) -> Any:
        result = types.CPointer(kind)

        def build(context: Any, b: Builder, signature: Any, args: Any) -> Value:
            return b.inttoptr(args[0], context.get_value_type(result))

        return result(types.int64), build

    return view


floats, ints, longs = cast(types.float32), cast(types.int32), cast(types.int64)
bytes_signed = cast(types.int8)


@intrinsic
def apart(typing: Any) -> Any:
    """Keep the function that calls this out of line, or LLVM compiles it again wherever it is used."""

    def build(context: Any, b: Builder, signature: Any, args: Any) -> Value:
        b.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), build


def float_intrinsic(build: Any, arguments: int, result: Any = types.float32) -> Any:
    """numba intrinsic of `arguments` int64 values; build(b, *values) emits it."""

    def lower(context: Any, b: Builder, signature: Any, args: Any) -> Value:
        value = build(b, *args)
        return context.get_dummy_value() if result is types.void else value

    if arguments == 2:

        @intrinsic
        def two(typing: Any, a: Any, n: Any) -> Any:
            return result(types.int64, types.int64), lower

        return two
    if arguments == 3:

        @intrinsic
        def three(typing: Any, a: Any, c: Any, n: Any) -> Any:
            return result(types.int64, types.int64, types.int64), lower

        return three

    if arguments == 4:

        @intrinsic
        def four(typing: Any, a: Any, c: Any, d: Any, n: Any) -> Any:
            return result(types.int64, types.int64, types.int64, types.int64), lower

        return four

    @intrinsic
    def five(typing: Any, a: Any, c: Any, d: Any, e: Any, n: Any) -> Any:
        return result(types.int64, types.int64, types.int64, types.int64, types.int64), lower

    return five


def _element(b: Builder, base: Value, index: Value, shift: int) -> Value:
    return at(b, base, b.shl(index, const(i64, shift)))


def _dot(b: Builder, w: Value, x: Value, n: Value) -> Value:
    w, x = pointer(b, w), pointer(b, x)

    def term(kind: ir.Type, i: Value) -> Value:
        return b.fmul(load(b, _element(b, w, i, 2), kind), load(b, _element(b, x, i, 2), kind))

    return lane_sum(b, n, lambda i: term(lanes_f32, i), lambda i: term(f32, i))


def _dot_bfloat16(b: Builder, w: Value, x: Value, n: Value) -> Value:
    w, x = pointer(b, w), pointer(b, x)

    def term(bits: ir.Type, wide: ir.Type, kind: ir.Type, i: Value) -> Value:
        raised = b.shl(b.zext(load(b, _element(b, w, i, 1), bits), wide), const(wide, 16))
        return b.fmul(b.bitcast(raised, kind), load(b, _element(b, x, i, 2), kind))

    many = (vector(i16, LANES), vector(i32, LANES), lanes_f32)
    return lane_sum(b, n, lambda i: term(*many, i), lambda i: term(i16, i32, f32, i))


def _dot_grouped(b: Builder, codes: Value, scales: Value, x: Value, k: Value) -> Value:
    codes, scales, x = pointer(b, codes), pointer(b, scales), pointer(b, x)

    def group(source: Value, i: Value, lanes: Value) -> Value:
        facing = at(b, x, b.shl(i, const(i64, 8)))
        terms = []
        for half in (0, LANES):
            code = b.sext(load(b, at(b, source, half), vector(i8, LANES)), vector(i32, LANES))
            terms.append(b.fmul(b.sitofp(code, lanes_f32), load(b, at(b, facing, 4 * half), lanes_f32)))
        scale = splat(b, load(b, _element(b, scales, i, 2), f32), LANES)
        return b.fadd(lanes, b.fmul(b.fadd(*terms), scale))

    def whole(i: Value, v: list[Value]) -> list[Value]:
        here = at(b, codes, b.shl(i, const(i64, 6)))
        emit.prefetch(b, at(b, here, 2048))
        return [group(here, i, v[0])]

    groups = b.lshr(k, const(i64, 6))
    (lanes,) = loop(b, groups, [const(lanes_f32, 0)], whole)
    start = b.shl(groups, const(i64, 6))
    rest = b.sub(k, start)
    before, slot = b.block, emit.stack(b, vector(i8, 64))
    with b.if_then(b.icmp_signed(">", rest, const(i64, 0))):
        store(b, const(vector(i8, 64), 0), slot)

        def copy(j: Value, _: list[Value]) -> list[Value]:
            store(b, load(b, at(b, codes, b.add(start, j)), i8), at(b, slot, j))
            return []

        loop(b, rest, [], copy)
        mixed = group(slot, groups, lanes)
        inside = b.block
    result = b.phi(lanes_f32)
    result.add_incoming(lanes, before)
    result.add_incoming(mixed, inside)
    return emit.halve(b, result)


def _four_weights(b: Builder) -> Value:
    """A table in the compiled code: the four weights t of a byte of codes, as floats, by the byte's value."""
    name = "bitnet_mlx_four_weights"
    table = b.module.globals.get(name)
    if table is None:
        values = [float((byte >> 2 * p & 3) - 1) for byte in range(256) for p in range(4)]
        kind = ir.ArrayType(f32, len(values))
        table = ir.GlobalVariable(b.module, kind, name)
        table.linkage, table.global_constant, table.align = "internal", True, 16
        table.initializer = ir.Constant(kind, values)
    return b.bitcast(table, i8.as_pointer())


def _dot_ternary(b: Builder, w: Value, scales: Value, groups: Value, x: Value, n: Value) -> Value:
    """groups: how many scales the row has; each weight is t * scale, rounded, before it meets x."""
    w, scales, x, table = pointer(b, w), pointer(b, scales), pointer(b, x), _four_weights(b)
    grouped = b.icmp_signed(">", groups, const(i64, 1))

    def four(i: Value) -> Value:
        byte = b.zext(load(b, at(b, w, b.lshr(i, const(i64, 2))), i8), i64)
        return at(b, table, b.shl(byte, const(i64, 4)))

    def scale(i: Value) -> Value:
        group = b.select(grouped, b.lshr(i, const(i64, 7)), const(i64, 0))
        return load(b, _element(b, scales, group, 2), f32)

    def whole(i: Value) -> Value:
        kind = vector(f32, 4)
        parts = [load(b, four(b.add(i, const(i64, j))), kind, 16) for j in range(0, LANES, 4)]
        while len(parts) > 1:
            count = 2 * parts[0].type.count
            parts = [emit.shuffle(b, parts[j], parts[j + 1], range(count)) for j in range(0, len(parts), 2)]
        weights = b.fmul(parts[0], splat(b, scale(i), LANES))
        return b.fmul(weights, load(b, _element(b, x, i, 2), lanes_f32))

    def single(i: Value) -> Value:
        t = load(b, _element(b, four(i), b.and_(i, const(i64, 3)), 2), f32)
        return b.fmul(b.fmul(t, scale(i)), load(b, _element(b, x, i, 2), f32))

    return lane_sum(b, n, whole, single)


def _sum(b: Builder, x: Value, n: Value) -> Value:
    x = pointer(b, x)
    return lane_sum(
        b, n, lambda i: load(b, _element(b, x, i, 2), lanes_f32), lambda i: load(b, _element(b, x, i, 2), f32)
    )


def _largest(b: Builder, x: Value, weight: Value | None, n: Value) -> Value:
    """max |x| or max |x * weight|; the order does not matter."""
    x = pointer(b, x)
    weight = None if weight is None else pointer(b, weight)

    def size(i: Value, kind: ir.Type) -> Value:
        v = load(b, _element(b, x, i, 2), kind)
        if weight is not None:
            v = b.fmul(v, load(b, _element(b, weight, i, 2), kind))
        suffix = f"v{LANES}f32" if kind is lanes_f32 else "f32"
        return b.call(declare(b, f"llvm.fabs.{suffix}", kind, [kind]), [v])

    def larger(a: Value, c: Value) -> Value:
        return b.select(b.fcmp_ordered(">", a, c), a, c)

    steps = b.lshr(n, const(i64, 5))
    start = b.shl(steps, const(i64, 5))
    (lanes,) = loop(
        b, steps, [const(lanes_f32, 0)], lambda i, v: [larger(size(b.shl(i, const(i64, 5)), lanes_f32), v[0])]
    )
    count = LANES
    while count > 1:
        count //= 2
        lanes = larger(
            emit.shuffle(b, lanes, lanes, range(count)), emit.shuffle(b, lanes, lanes, range(count, 2 * count))
        )
    top = b.extract_element(lanes, const(i32, 0))
    (top,) = loop(b, b.sub(n, start), [top], lambda i, v: [larger(size(b.add(start, i), f32), v[0])])
    return top


dot = float_intrinsic(_dot, 3)
dot_bfloat16 = float_intrinsic(_dot_bfloat16, 3)
dot_grouped = float_intrinsic(_dot_grouped, 4)
dot_ternary = float_intrinsic(_dot_ternary, 5)
lane_total = float_intrinsic(_sum, 2)
largest = float_intrinsic(lambda b, x, n: _largest(b, x, None, n), 2)
largest_product = float_intrinsic(_largest, 3)


@intrinsic
def power_of_two(typing: Any, n: Any) -> Any:
    """2^n of a float32 that is a whole number in -126 .. 127."""

    def build(context: Any, b: Builder, signature: Any, args: Any) -> Value:
        exponent = b.add(b.fptosi(args[0], i32), const(i32, 127))
        return b.bitcast(b.shl(exponent, const(i32, 23)), f32)

    return types.float32(types.float32), build


@njit(**OPTIONS)
def exp(x):
    """numpy_ref.exp of one float32."""
    x = EXP_LOW if x < EXP_LOW else x
    x = EXP_HIGH if x > EXP_HIGH else x
    n = (x * LOG2E + MAGIC) - MAGIC
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    p = P0 * r + P1
    p = p * r + P2
    p = p * r + P3
    p = p * r + P4
    p = p * r + P5
    y = (p * (r * r) + r) + ONE
    return y * power_of_two(n)


@njit(**OPTIONS)
def rms_factor(x, k, eps):
    """1 / sqrt(mean(x^2) + eps) of k floats at address x."""
    return ONE / np.sqrt(dot(x, x, k) / np.float32(k) + eps)


@njit(**OPTIONS)
def norm_row(x, weight, k, eps, out):
    """(x * r) * weight; out may be x."""
    r = rms_factor(x, k, eps)
    source, w, y = floats(x), floats(weight), floats(out)
    for i in range(k):
        y[i] = source[i] * r * w[i]


@njit(**OPTIONS)
def rms_norm(x, weight, k, eps, out):
    """The same, and zeros up to a whole block of 128."""
    norm_row(x, weight, k, eps, out)
    y = floats(out)
    for i in range(k, (k + 127) // 128 * 128):
        y[i] = ZERO


@njit(**OPTIONS)
def quantiser_factors(x, weight, k, eps):
    """(factor on x * weight that gives codes, scale s) of one row; without a norm (weight 0) both are 127 / max|x|."""
    if weight == 0:
        top = largest(x, k)
        s = TOP / (top if top > MIN_SCALE else MIN_SCALE)
        return s, s
    r = rms_factor(x, k, eps)
    a = largest_product(x, weight, k)
    c = a if a * r >= MIN_SCALE else MIN_SCALE / r
    return TOP / c, TOP / (c * r)
