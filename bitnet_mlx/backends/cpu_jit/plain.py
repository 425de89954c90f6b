"""Any processor: LLVM's own vector operations, which it lowers to whatever the processor has.

A 16-bit lane takes |2 * 128| = 256 a step and 4 * 2 steps a block, so 16 blocks stay within -32768 .. 32512.
"""

from __future__ import annotations

from bitnet_mlx.backends.cpu_jit.emit import Builder, Value, const, i8, i16, i32, shuffle, vector

name = "plain"
width = 16
parts = 2  # narrow sums of one token
limit = 16
narrow = vector(i16, 16)
wide = vector(i32, 8)
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
    return b.add(total, b.mul(b.zext(code, narrow), b.sext(x, narrow)))


def widen(b: Builder, total: Value, part: Value) -> Value:
    """The wide total with a narrow part added to it."""
    low, high = (b.sext(shuffle(b, part, part, range(h, h + 8)), wide) for h in (0, 8))
    return b.add(total, b.add(low, high))
