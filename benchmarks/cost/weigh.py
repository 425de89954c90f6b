"""What the instructions of a loop cost an Apple GPU: a model, not a measurement.

Cycles of one lane for each operation, after philipturner/metal-benchmarks (M1 and M2: its tables of instruction
throughputs and its layout of the ALU): float fma, add and multiply, 32-bit integer add, bitwise operation, compare and
select 1; an add fused with a left shift by 1 to 4 is one add; constant right shift (bit extract), longer left shift,
multiplication, conversion between integer and float 4; a right shift by an unknown amount 8; a 64-bit add 4; a precise
division 31; a shuffle between lanes 2 (256 bytes a cycle and core). 16-bit operands and results of float operations
are free, and so is the upper half of a register. A core issues 128 lanes a cycle.

Not published, taken so: a branch 1; a sum over lanes as five shuffles and five adds; an integer division by a constant
as the upper half of a product and a shift, 12; of a load's address, base, index and constant are free.
Loads and stores are counted and not weighed; a core's load path gives 64 bytes a cycle, which is shown beside.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from benchmarks.cost.ir import Instruction, UnknownTextError

CYCLES = {
    "bitwise": 1,
    "integer add": 1,
    "64-bit add": 4,
    "shift or extract": 4,
    "shift by a value": 8,
    "integer multiply": 4,
    "compare or select": 1,
    "branch": 1,
    "int-float conversion": 4,
    "fma": 1,
    "float add or multiply": 1,
    "bfloat widening": 1,
    "division": 31,
    "integer division by a constant": 12,
    "shuffle": 2,
    "sum over lanes": 15,
}
LOAD_BYTES_A_CYCLE = 0.5  # of one lane: 64 bytes a core, for 128 lanes

_FREE = "alloca ret phi bitcast extractelement insertelement shufflevector zext trunc freeze addrspacecast fneg".split()
_BITWISE = "and or xor".split()
_FLOAT = "fadd fsub fmul".split()
_CONVERSIONS = "sitofp uitofp fptosi fptoui".split()
_INTRINSICS = {
    "fma": "fma",
    "fmuladd": "fma",
    "umin": "compare or select",
    "umax": "compare or select",
    "smin": "compare or select",
    "smax": "compare or select",
    "minnum": "compare or select",
    "maxnum": "compare or select",
    "rint": "int-float conversion",
    "bitreverse": "shift or extract",
}
_MARKERS = "llvm.lifetime llvm.assume llvm.experimental.noalias".split()
_LANE_SUMS = range(7)  # the operation's number in tests/emulator/metal/simd.h: a sum, maximum and the like
_SHUFFLES = range(11, 20)
_SIZE = {"half": 2, "bfloat": 2, "float": 4, "double": 8, "ptr": 8}


class Counted(Counter[str]):
    """Operations by kind, and "loads", "loaded bytes", "stores", "stored bytes"."""

    @property
    def cycles(self) -> float:
        """Weighed cycles of one lane."""
        return sum(CYCLES[kind] * number for kind, number in self.items() if kind in CYCLES)


def count(loop: Sequence[Instruction]) -> Counted:
    """Count a loop's instructions by kind, each block once. Raises UnknownTextError for one that has no known price."""
    found = Counted()
    for instruction in loop:
        for kind, number in _kinds(instruction, loop):
            if number:
                found[kind] += number
    return found


def _kinds(i: Instruction, loop: Sequence[Instruction]) -> list[tuple[str, int]]:
    """(kind, how many) of one instruction."""
    op, lanes = i.operation, _lanes(i.text)
    if op in _FREE:
        return []
    if op in ("load", "store"):
        if "addrspace" not in i.text:
            return _private(i, loop)
        size = _bytes(i.text)
        return [(f"{op}s", 1), ("loaded bytes" if op == "load" else "stored bytes", size)]
    if op == "or" and "disjoint" in i.text and re.search(r", \d+$", i.text) and _only_address(i, loop):
        return []  # an index plus a constant
    if op in _BITWISE:
        return [("bitwise", lanes)]
    if op in ("add", "sub"):
        return [("64-bit add" if " i64 " in i.text else "integer add", lanes)]
    if op in ("shl", "lshr", "ashr"):
        return _shift(i, loop, lanes)
    if op == "mul":
        return _multiply(i, lanes)
    if op in ("icmp", "fcmp", "select"):
        return [("compare or select", lanes)]
    if op == "br":
        return [("branch", 1)]
    if op in _CONVERSIONS:
        return [("int-float conversion", lanes)]
    if op in _FLOAT:
        return [("float add or multiply", lanes)]
    if op in ("udiv", "sdiv") and re.search(r", \d+$", i.text):
        return [("integer division by a constant", lanes)]
    if op in ("urem", "srem") and re.search(r", \d+$", i.text):
        return [("integer division by a constant", lanes), ("integer multiply", lanes), ("integer add", lanes)]
    if op == "fdiv":
        return [("division", lanes)]
    if op in ("fpext", "fptrunc"):
        return [("bfloat widening", lanes)] if "bfloat" in i.text else []
    if op == "sext":
        if re.search(r"sext (nneg )?i32 .* to i64", i.text):
            return []
        raise UnknownTextError(f"[cost] no price is known for: {i.text}")
    if op == "getelementptr":
        return _address(i, loop)
    if op == "call":
        return _call(i, lanes)
    raise UnknownTextError(f"[cost] no price is known for: {i.text}")


def _shift(i: Instruction, loop: Sequence[Instruction], lanes: int) -> list[tuple[str, int]]:
    constant = re.search(r", (\d+)$", i.text)
    if not constant:
        return [("shift by a value", lanes)]
    by = int(constant.group(1))
    users = [u for u in loop if i.result in u.operands]
    if i.operation == "lshr" and by == 16 and users and all(re.match(r"trunc .*to i16$", u.text) for u in users):
        return []  # the upper half of a register
    if i.operation == "shl" and by <= 4:
        return [("64-bit add" if " i64 " in i.text else "integer add", lanes)]
    return [("shift or extract", lanes)]


def _multiply(i: Instruction, lanes: int) -> list[tuple[str, int]]:
    """A small constant's product is a shifted add: 2^k + 1 one, (2^k + 1) 2^j two, k and j from 1 to 4."""
    constant = re.search(r", (\d+)$", i.text)
    factor = int(constant.group(1)) if constant else 0
    if factor - 1 in (2, 4, 8, 16):
        return [("integer add", lanes)]
    if any(factor == (1 + (1 << k)) << j for k in range(1, 5) for j in range(1, 5)):
        return [("integer add", 2 * lanes)]
    return [("integer multiply", lanes)]


def _address(i: Instruction, loop: Sequence[Instruction]) -> list[tuple[str, int]]:
    """A load's base, index and constant are free; a pointer that is carried to the next pass is a 64-bit add."""
    carried = any(u.operation == "phi" for u in loop if i.result in u.operands)
    return [("64-bit add", 1)] if carried else []


def _only_address(i: Instruction, loop: Sequence[Instruction]) -> bool:
    """Whether a value goes into addresses alone, or is widened to go there."""
    users = [u for u in loop if i.result in u.operands]
    return bool(users) and all(
        u.operation == "getelementptr" or (u.operation in ("zext", "sext") and _only_address(u, loop)) for u in users
    )


def _call(i: Instruction, lanes: int) -> list[tuple[str, int]]:
    named = re.search(r"@([\w.]+)\(", i.text)
    name = named.group(1) if named else ""
    intrinsic = re.match(r"llvm\.(\w+)\.", name)
    if intrinsic and intrinsic.group(1) in _INTRINSICS:
        return [(_INTRINSICS[intrinsic.group(1)], lanes)]
    if name.startswith(tuple(_MARKERS)):
        return []
    if name == "emulator_simd":
        number = re.search(r"\(i32 (?:noundef )?(\d+)", i.text)
        operation = int(number.group(1)) if number else -1
        if operation in _LANE_SUMS:
            return [("sum over lanes", 1)]
        if operation in _SHUFFLES:
            return [("shuffle", 1)]
    raise UnknownTextError(f"[cost] no price is known for: {i.text}")


def _private(i: Instruction, loop: Sequence[Instruction]) -> list[tuple[str, int]]:
    """What carries a value to the emulator's collective operations is no memory of a GPU's; any other is refused."""
    place = re.search(r"ptr (%[\w.]+)", i.text)
    if place and any("@emulator_simd(" in u.text for u in loop if place.group(1) in u.operands):
        return []
    raise UnknownTextError(f"[cost] an array or variable is kept in memory: {i.text}")


def _lanes(text: str) -> int:
    vector = re.search(r"<(\d+) x ", text)
    return int(vector.group(1)) if vector else 1


def _bytes(text: str) -> int:
    kind = re.search(r"(?:load|store) (?:volatile )?(<\d+ x \w+>|\w+)", text)
    scalar = re.sub(r"<\d+ x (\w+)>", r"\1", kind.group(1)) if kind else ""
    if scalar in _SIZE:
        return _SIZE[scalar] * _lanes(kind.group(1) if kind else "")
    if re.fullmatch(r"i\d+", scalar):
        return int(scalar[1:]) // 8 * _lanes(kind.group(1) if kind else "")
    raise UnknownTextError(f"[cost] no size is known for: {text}")
