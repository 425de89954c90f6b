"""LLVM IR as text: a function's blocks, who uses a value, and the innermost loops."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

_VALUE = r'%(?:[\w.$-]+|"[^"]*")'
_LABEL = re.compile(r'^([\w.$-]+|"[^"]*"):')
_ASSIGNED = re.compile(rf"^\s*({_VALUE}) = (.*)$")
_TARGET = re.compile(rf"label ({_VALUE})")


class UnknownTextError(ValueError):
    """IR that this reader does not know: a count made from it could be wrong."""


@dataclass(frozen=True)
class Instruction:
    """result: the value that it defines, or "". text: all after the equals sign, without metadata. block: its label."""

    result: str
    text: str
    block: str

    @property
    def operation(self) -> str:
        """The first word, after tail and the like."""
        words = self.text.split()
        return words[1] if words[0] in ("tail", "musttail", "notail") else words[0]

    @cached_property
    def operands(self) -> frozenset[str]:
        """Every value that the text names."""
        return frozenset(re.findall(_VALUE, self.text))


class Function:
    """One function of a module."""

    def __init__(self, module: str, name: str) -> None:
        """Read the only function whose symbol contains `name`. Raises UnknownTextError if there is none, or more than one."""
        found = re.findall(rf"^define [^\n]*@[^\n(]*{re.escape(name)}[^\n]*\{{\n(.*?)^\}}", module, re.S | re.M)
        if len(found) != 1:
            raise UnknownTextError(f"[cost] {len(found)} functions of the IR are named like {name}; one was expected")
        self.blocks: dict[str, list[Instruction]] = {}
        label = "%entry"
        for line in found[0].splitlines():
            named = _LABEL.match(line)
            if named:
                label = "%" + named.group(1)
            elif line.strip() and not line.lstrip().startswith(";"):
                self.blocks.setdefault(label, []).append(_instruction(line, label))
        self.next = {label: self._targets(label) for label in self.blocks}

    def _targets(self, label: str) -> list[str]:
        last = self.blocks[label][-1]
        if last.operation == "br":
            return _TARGET.findall(last.text)
        if last.operation in ("ret", "unreachable"):
            return []
        raise UnknownTextError(f"[cost] a block ends with {last.text}")

    def loops(self) -> list[list[Instruction]]:
        """The instructions of each innermost loop, all its blocks together."""
        return [[i for label in self.blocks if label in loop for i in self.blocks[label]] for loop in self._innermost()]

    def outside(self) -> list[Instruction]:
        """The instructions that stand in no loop."""
        inside = set().union(*_cycles(set(self.blocks), self.next))
        return [i for label in self.blocks if label not in inside for i in self.blocks[label]]

    def _innermost(self) -> list[set[str]]:
        found = []
        pending = _cycles(set(self.blocks), self.next)
        while pending:
            loop = pending.pop()
            outside = [a for a in self.blocks if a not in loop]
            heads = {b for a in outside for b in self.next[a] if b in loop}
            inner = _cycles(loop - heads, self.next)
            if inner:
                pending += inner
            else:
                found.append(loop)
        return found


def _instruction(line: str, block: str) -> Instruction:
    line = re.sub(r"(, !\w+(\.\w+)* !\d+)+\s*$", "", line)
    assigned = _ASSIGNED.match(line)
    result, text = assigned.groups() if assigned else ("", line)
    return Instruction(result, re.sub(r"\s*#\d+$", "", text.strip()), block)


def _cycles(labels: set[str], following: dict[str, list[str]]) -> list[set[str]]:
    """Sets of blocks that reach each other, within `labels`."""
    reach = {a: _reached(a, labels, following) for a in labels}
    found: list[set[str]] = []
    for a in labels:
        if a in reach[a] and not any(a in cycle for cycle in found):
            found.append({b for b in reach[a] if a in reach[b]})
    return found


def _reached(start: str, labels: set[str], following: dict[str, list[str]]) -> set[str]:
    seen: set[str] = set()
    pending = [start]
    while pending:
        for b in following[pending.pop()]:
            if b in labels and b not in seen:
                seen.add(b)
                pending.append(b)
    return seen
