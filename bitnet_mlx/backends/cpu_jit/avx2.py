"""x86-64 with AVX2: 32 unsigned codes times 32 signed bytes, summed in pairs into 16-bit lanes (pmaddubsw).

A lane takes |2 * 2 * 128| = 512 a step and 4 steps a block, so 16 blocks stay within -32768 .. 32512.

For one token, planes 1 and 3 keep their codes times 4, which saves two shifts. Each has a sum of its own, which takes 2048
a block and so holds 16 blocks too; three sums also make the chains of additions shorter.
"""

from __future__ import annotations

from llvmlite import ir

from bitnet_mlx.backends.cpu_jit.emit import Builder, Value, const, declare, i8, i16, i32, vector

name = "avx2"
width = 32  # codes a vector
limit = 16  # blocks of 128 codes before a narrow lane could overflow
parts = 3  # narrow sums of one token
narrow = vector(i16, 16)
wide = vector(i32, 8)
_bytes = vector(i8, 32)


def codes(b: Builder, packed: Value, plane: int) -> Value:
    """Codes `plane`, `plane` + 4, ... of 32 packed bytes, one a byte."""
    shifted = b.lshr(b.bitcast(packed, narrow), const(narrow, 2 * plane)) if plane else packed
    return b.and_(b.bitcast(shifted, _bytes), const(_bytes, 3))


def row_codes(b: Builder, packed: Value, plane: int) -> tuple[Value, int]:
    """Codes of a plane and the narrow sum they belong to: planes 0 and 2 as they are, 1 and 3 times 4."""
    base = packed if plane < 2 else b.bitcast(b.lshr(b.bitcast(packed, narrow), const(narrow, 4)), _bytes)
    if plane % 2 == 0:
        return b.and_(base, const(_bytes, 3)), 0
    return b.and_(base, const(_bytes, 12)), 1 + plane // 2


def combine(b: Builder, total: Value, sums: list[Value]) -> Value:
    """The wide total with the three narrow sums added to it."""
    zero = const(wide, 0)
    fours = widen(b, widen(b, zero, sums[1]), sums[2])
    return b.add(widen(b, total, sums[0]), b.ashr(fours, const(wide, 2)))


def multiply_add(b: Builder, total: Value, code: Value, x: Value) -> Value:
    multiply = declare(b, "llvm.x86.avx2.pmadd.ub.sw", narrow, [_bytes, _bytes])
    return b.add(total, b.call(multiply, [code, x]))


def widen(b: Builder, total: Value, part: Value) -> Value:
    """The wide total with a narrow part added to it."""
    pair = declare(b, "llvm.x86.avx2.pmadd.wd", wide, [narrow, narrow])
    return b.add(total, b.call(pair, [part, ir.Constant(narrow, [1] * 16)]))
