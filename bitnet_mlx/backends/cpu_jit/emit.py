"""Small helpers over llvmlite: vectors, loads at any address, counted loops, sums in the fixed order of 32 lanes.

Nothing here sets a fast-math flag and LLVM may not contract or reorder float operations without one, so what is
written is what runs, on every processor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

i1, i8, i16, i32, i64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
f32 = ir.FloatType()
LANES = 32
lanes_f32 = ir.VectorType(f32, LANES)

Builder = Any  # llvmlite.ir.IRBuilder
Value = Any


def vector(element: ir.Type, count: int) -> ir.VectorType:
    """The type of `count` elements."""
    return ir.VectorType(element, count)


def const(kind: ir.Type, value: float) -> ir.Constant:
    """A scalar, or a vector of equal elements."""
    return ir.Constant(kind, [value] * kind.count) if isinstance(kind, ir.VectorType) else ir.Constant(kind, value)


def pointer(b: Builder, address: Value) -> Value:
    """An int64 address as a byte pointer."""
    return b.inttoptr(address, i8.as_pointer())


def at(b: Builder, base: Value, offset: Value | int) -> Value:
    """A byte pointer moved by `offset` bytes."""
    return b.gep(base, [const(i64, offset) if isinstance(offset, int) else offset])


def load(b: Builder, base: Value, kind: ir.Type, align: int = 1) -> Value:
    """A value of type `kind` at a byte pointer; `align` is what may be assumed of the address."""
    value = b.load(b.bitcast(base, kind.as_pointer()))
    value.align = align
    return value


def store(b: Builder, value: Value, base: Value, align: int = 1) -> None:
    """Write a value to a byte pointer."""
    b.store(value, b.bitcast(base, value.type.as_pointer())).align = align


def shuffle(b: Builder, x: Value, y: Value, lanes: Sequence[int]) -> Value:
    """The chosen lanes of x followed by y."""
    return b.shuffle_vector(x, y, ir.Constant(vector(i32, len(lanes)), list(lanes)))


def splat(b: Builder, value: Value, count: int) -> Value:
    """A vector of `count` copies of a scalar."""
    one = b.insert_element(ir.Constant(vector(value.type, count), ir.Undefined), value, const(i32, 0))
    return shuffle(b, one, one, [0] * count)


def loop(
    b: Builder, count: Value, values: Sequence[Value], body: Callable[[Value, list[Value]], Sequence[Value]]
) -> list[Value]:
    """for i in range(count): values = body(i, values). Returns the last values; count may be 0."""
    before = b.block
    head, inside, after = (b.append_basic_block(n) for n in ("loop", "body", "after"))
    b.branch(head)
    b.position_at_end(head)
    i = b.phi(i64)
    carried = [b.phi(v.type) for v in values]
    b.cbranch(b.icmp_signed("<", i, count), inside, after)
    b.position_at_end(inside)
    new = body(i, list(carried))
    following = b.add(i, const(i64, 1))
    i.add_incoming(const(i64, 0), before)
    i.add_incoming(following, b.block)
    for phi, first, later in zip(carried, values, new, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(later, b.block)
    b.branch(head)
    b.position_at_end(after)
    return list(carried)


def halve(b: Builder, lanes: Value) -> Value:
    """Sum of a float vector's lanes: lane l += lane l + h, for h = half, quarter, ... 1."""
    count = lanes.type.count
    while count > 1:
        count //= 2
        low, high = shuffle(b, lanes, lanes, range(count)), shuffle(b, lanes, lanes, range(count, 2 * count))
        lanes = b.fadd(low, high)
    return b.extract_element(lanes, const(i32, 0))


def stack(b: Builder, kind: ir.Type) -> Value:
    """Room for one value of `kind` in the function's frame, as a byte pointer."""
    with b.goto_entry_block():
        slot = b.alloca(kind)
        slot.align = 32
    return b.bitcast(slot, i8.as_pointer())


def lane_sum(b: Builder, count: Value, whole: Callable[[Value], Value], single: Callable[[Value], Value]) -> Value:
    """The lane sum of `count` terms as a float: whole(i) gives the 32 terms from i on, single(i) the term i."""
    steps = b.lshr(count, const(i64, 5))
    start = b.shl(steps, const(i64, 5))
    (lanes,) = loop(b, steps, [const(lanes_f32, 0)], lambda i, v: [b.fadd(v[0], whole(b.shl(i, const(i64, 5))))])
    rest = b.sub(count, start)
    before = b.block
    slot = stack(b, lanes_f32)
    with b.if_then(b.icmp_signed(">", rest, const(i64, 0))):
        store(b, lanes, slot)

        def add_one(i: Value, _: list[Value]) -> list[Value]:
            lane = at(b, slot, b.shl(i, const(i64, 2)))
            store(b, b.fadd(load(b, lane, f32), single(b.add(start, i))), lane)
            return []

        loop(b, rest, [], add_one)
        mixed = load(b, slot, lanes_f32)
        inside = b.block
    result = b.phi(lanes_f32)
    result.add_incoming(lanes, before)
    result.add_incoming(mixed, inside)
    return halve(b, result)


def declare(b: Builder, name: str, result: ir.Type, arguments: Sequence[ir.Type]) -> Value:
    """An LLVM intrinsic by name."""
    found = b.module.globals.get(name)
    return found if found is not None else ir.Function(b.module, ir.FunctionType(result, list(arguments)), name)


def prefetch(b: Builder, base: Value) -> None:
    """Ask for the cache line at `base`, which may lie past the end of the data."""
    fetch = declare(b, "llvm.prefetch.p0", ir.VoidType(), [i8.as_pointer(), i32, i32, i32])
    b.call(fetch, [base, const(i32, 0), const(i32, 3), const(i32, 1)])
