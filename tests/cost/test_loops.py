"""The IR's reader and the prices on small hand-written functions."""

import pytest

from benchmarks.cost import weigh
from benchmarks.cost.ir import Function, UnknownTextError

NESTED = """
define void @outer_name(ptr addrspace(1) %0, i32 %1) local_unnamed_addr #0 {
  %3 = add i32 %1, 1
  br label %4

4:                                                ; preds = %9, %2
  %5 = phi i32 [ 0, %2 ], [ %10, %9 ]
  br label %6

6:                                                ; preds = %6, %4
  %7 = phi i32 [ 0, %4 ], [ %8, %6 ]
  %8 = add nuw i32 %7, 1, !dbg !3
  %c = icmp eq i32 %8, %3
  br i1 %c, label %9, label %6, !llvm.loop !7

9:                                                ; preds = %6
  %10 = add i32 %5, 32
  %11 = icmp ult i32 %10, %1
  br i1 %11, label %4, label %12

12:                                               ; preds = %9
  ret void
}
"""


def loop(*lines):
    """A function with one loop of these lines, counted."""
    body = "\n".join(f"  {line}" for line in lines)
    text = f"define void @f(i32 %n) {{\n  br label %1\n\n1:\n{body}\n  br i1 %e, label %1, label %2\n\n2:\n  ret void\n}}\n"
    [found] = Function(text, "f").loops()
    return weigh.count(found)


def test_innermost_loop_and_the_rest():
    function = Function(NESTED, "outer_name")
    [inner] = function.loops()
    assert [i.operation for i in inner] == ["phi", "add", "icmp", "br"]
    assert inner[1].text == "add nuw i32 %7, 1"
    assert [i.operation for i in function.outside()] == ["add", "br", "ret"]
    with pytest.raises(UnknownTextError, match="0 functions"):
        Function(NESTED, "another")


PRICES = [
    ("%a = xor i32 %n, 5", "bitwise", 1),
    ("%a = and <2 x i32> %n, %m", "bitwise", 2),
    ("%a = add i32 %n, 5", "integer add", 1),
    ("%a = add nuw i64 %n, 5", "64-bit add", 4),
    ("%a = shl i32 %n, 2", "integer add", 1),
    ("%a = shl i32 %n, 5", "shift or extract", 4),
    ("%a = lshr i32 %n, 6", "shift or extract", 4),
    ("%a = lshr i32 %n, %m", "shift by a value", 8),
    ("%a = mul nuw nsw i32 %n, 3", "integer add", 1),
    ("%a = mul i32 %n, 12", "integer add", 2),
    ("%a = mul i32 %n, 7", "integer multiply", 4),
    ("%a = uitofp i32 %n to float", "int-float conversion", 4),
    ("%a = tail call noundef float @llvm.fma.f32(float %x, float %y, float %z)", "fma", 1),
    ("%a = fmul contract float %x, %y", "float add or multiply", 1),
    ("%a = fpext bfloat %x to float", "bfloat widening", 1),
    ("%a = fdiv float %x, %y", "division", 31),
]


@pytest.mark.parametrize(("line", "kind", "cycles"), PRICES)
def test_price(line, kind, cycles):
    alone, with_it = loop(), loop(line)
    assert with_it.cycles - alone.cycles == cycles
    assert set(with_it) - set(alone) == {kind}


def test_what_is_free():
    free = loop(
        "%h = lshr i32 %n, 16",
        "%t = trunc nuw i32 %h to i16",
        "%b = bitcast i16 %t to half",
        "%w = fpext half %b to float",
        "%i = or disjoint i32 %n, 3",
        "%z = zext i32 %i to i64",
        "%p = getelementptr inbounds half, ptr addrspace(1) %q, i64 %z",
    )
    assert free == loop()


def test_loads_are_counted_and_not_weighed():
    found = loop("%a = load <4 x i32>, ptr addrspace(1) %p, align 16", "%b = load half, ptr addrspace(2) %q, align 2")
    assert found["loads"] == 2 and found["loaded bytes"] == 18
    assert found.cycles == loop().cycles


def test_a_carried_pointer_is_a_64_bit_add():
    found = loop(
        "%p = phi ptr addrspace(1) [ %s, %0 ], [ %next, %1 ]", "%next = getelementptr i8, ptr addrspace(1) %p, i64 64"
    )
    assert found["64-bit add"] == 1


@pytest.mark.parametrize(
    "line",
    [
        "%a = frem float %x, %y",
        "%a = call float @cosf(float %x)",
        "%a = load float, ptr %p, align 4",
        "%a = sext i8 %n to i32",
        "%a = udiv i32 %n, %m",
        "%a = atomicrmw add ptr addrspace(1) %p, i32 1 monotonic",
    ],
)
def test_unknown_instruction_is_refused(line):
    with pytest.raises(UnknownTextError):
        loop(line)
