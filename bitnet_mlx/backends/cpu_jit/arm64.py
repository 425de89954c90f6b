"""ARM64 with the dot-product instruction (all Apple chips): four products a 32-bit lane at once, nothing to widen."""

from __future__ import annotations

from bitnet_mlx.backends.cpu_jit.emit import Builder, Value, const, declare, i8, i32, vector

name = "sdot"
width = 16
parts = 2  # narrow sums of one token
limit = 1 << 20  # a 32-bit lane takes |4 * 2 * 128| a step
narrow = vector(i32, 4)
wide = vector(i32, 4)
_bytes = vector(i8, 16)


def codes(b: Builder, packed: Value, plane: int) -> Value:
    """Codes `plane`, `plane` + 4, ... of 16 packed bytes, one a byte."""
    shifted = b.lshr(packed, const(_bytes, 2 * plane)) if plane else packed
    return b.and_(shifted, const(_bytes, 3))


def row_codes(b: Builder, packed: Value, plane: int) -> tuple[Value, int]:
    """Codes of a plane and the narrow sum they belong to."""
    return codes(b, packed, plane), plane % 2


def combine(b: Builder, total: Value, sums: list[Value]) -> Value:
    """The wide total with the narrow sums added to it."""
    return widen(b, widen(b, total, sums[0]), sums[1])


def multiply_add(b: Builder, total: Value, code: Value, x: Value) -> Value:
    dot = declare(b, "llvm.aarch64.neon.sdot.v4i32.v16i8", narrow, [narrow, _bytes, _bytes])
    return b.call(dot, [total, code, x])


def widen(b: Builder, total: Value, part: Value) -> Value:
    """The wide total with another part added to it."""
    return b.add(total, part)
