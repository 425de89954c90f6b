"""Unoptimised LLVM IR of a kernel, checked and instrumented: every access to device, constant and threadgroup memory
first calls the runtime; then the address spaces, which have done their work, are taken out."""

from __future__ import annotations

import re

_BYTES = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "half": 2, "bfloat": 2, "float": 4, "double": 8, "ptr": 8}
_TYPE = r"(?:<\d+ x \w+>|\[[^\]]*\]|ptr(?: addrspace\(\d\))?|[%\w.\"]+)"
_LOAD = re.compile(rf"^  (%\S+) = load (?:volatile )?({_TYPE}), ptr addrspace\(([123])\) (.+), align (\d+)")
_STORE = re.compile(rf"^  store (?:volatile )?({_TYPE}) .+, ptr addrspace\(([123])\) (.+), align (\d+)")
_COPY = re.compile(r"^  (?:tail )?call void @llvm\.mem(cpy|move|set)\.[^(]*\((.*)\)")
# What touches memory of these spaces and is none of the above.
_UNKNOWN = re.compile(
    r"^  (?:%\S+ = load|store)\b.*, ptr addrspace\([123]\)"
    r"|^  .*@llvm\.(?!lifetime|assume|dbg|prefetch)[^(]*\(.*ptr addrspace\([123]\)"
)
_POINTER = re.compile(r"ptr addrspace\(([123])\) (?:\w+ )*?align (\d+) (\S+),")
_ARITHMETIC = re.compile(
    r"= (?:fpext .* to double|f(?:add|sub|mul|div|rem|neg|cmp)\b[^,]*\bdouble |[us]itofp .* to double)"
)
_HALF = re.compile(
    r"^  (%\S+) = ((?:load (?:volatile )?|bitcast \S+ \S+ to |bitcast <[^>]*> \S+ to )(half\b|<(\d) x half>).*)"
)
_DIVIDE = re.compile(r"(%\S+) = fdiv (?:fast|[a-z ]*arcp[a-z ]*) float (\S+), ([^,\s]+)")
_CONVERT = re.compile(r"^  %\S+ = fpto([su])i float (\S+) to i(\d+)")
DECLARATIONS = """
declare void @emulator_access(ptr, i64, i32, i32, i32)
declare void @emulator_conversion(float, i32, i32)
declare void @emulator_trap(i8)
declare float @emulator_rough_divide(float, float)
declare half @emulator_flush_half(half)
"""


class RefusedError(AssertionError):
    """A Metal compiler would refuse the text, or the emulator's rules do."""


def instrument(ir: str, flags: tuple[str, ...]) -> str:
    """The IR to optimise and link. Raises RefusedError for double arithmetic and for a pointer that loses its address space."""
    out: list[str] = []
    flush = "flush_half" in flags
    casts: dict[str, str] = {}
    for line in ir.splitlines():
        line = _without_cast(line, casts)
        if _ARITHMETIC.search(line):
            raise RefusedError(f"double arithmetic: {line.strip()}")
        if "atomicrmw" in line or "cmpxchg" in line:
            raise RefusedError(f"the emulator knows no atomic operation: {line.strip()}")
        out += _checks(line)
        match = _HALF.match(line) if flush else None
        if "fast_math" in flags:
            line = _DIVIDE.sub(r"\1 = call float @emulator_rough_divide(float \2, float \3)", line)
        out += _flushed(match) if match else [line]
    text = "\n".join(out) + DECLARATIONS
    text = text.replace("call void @llvm.ubsantrap(i8", "call void @emulator_trap(i8")
    text = re.sub(r"\baddrspacecast\b", "bitcast", text)
    text = re.sub(r" addrspace\([1234]\)", "", text)
    text = re.sub(r"(@llvm\.[\w.]+)", lambda m: re.sub(r"\.p[1234]\b", ".p0", m[1]), text)
    return _declared_once(text)


_CAST = re.compile(r"^  (%\S+) = addrspacecast ptr( addrspace\(\d\))? (\S+) to ptr addrspace\(4\)$")


def _declared_once(text: str) -> str:
    """Without the second declaration of what differed in an address space only."""
    seen: set[str] = set()
    lines = []
    for line in text.splitlines():
        name = re.match(r"declare .*?(@[\w.]+)\(", line)
        if name is None or name[1] not in seen:
            lines.append(line)
        if name:
            seen.add(name[1])
    return "\n".join(lines) + "\n"


def _without_cast(line: str, casts: dict[str, str]) -> str:
    """The line with casts to clang's generic space (4) looked through, where Metal has none to make.

    A method without a qualifier takes its object through a generic pointer: from thread memory (0) only. A struct copied
    from or to another space is a memcpy of generic pointers: the real ones take their place. All else is a lost space.
    """
    if line.startswith("define"):
        casts.clear()
    if match := _CAST.match(line):
        if match[2]:
            casts[match[1]] = f"ptr{match[2]} align 1 {match[3]}"
        return line
    if "addrspacecast" in line:
        raise RefusedError(f"a pointer loses its address space: {line.strip()}")
    for name, real in casts.items():
        if re.search(rf"{re.escape(name)}(?![\w.])", line):
            if "@llvm.memcpy" not in line:
                raise RefusedError(f"a pointer loses its address space: {real} in {line.strip()}")
            line = re.sub(
                rf"ptr addrspace\(4\) (align \d+ )?(\w+ )*{re.escape(name)}(?![\w.])",
                lambda m, r=real: _aligned(r, m[1]),
                line,
            )
    return line


def _aligned(pointer: str, align: str | None) -> str:
    return pointer.replace("align 1 ", align or "align 1 ")


def _checks(line: str) -> list[str]:
    """Calls of the runtime that stand before a line."""
    if match := _LOAD.match(line):
        _, kind, space, address, align = match.groups()
        return [_access(address, _size(kind, line), align, space, False)]
    if match := _STORE.match(line):
        kind, space, address, align = match.groups()
        return [_access(address, _size(kind, line), align, space, True)]
    if match := _COPY.match(line):
        length = re.findall(r"i(?:64|32) ([^,]+), i1", match[2])[-1]
        found = []
        for i, pointer in enumerate(match[2].split(", ptr ")):
            text = pointer if pointer.startswith("ptr ") else "ptr " + pointer
            if inner := _POINTER.match(text + ","):
                found.append(_access(inner[3], length, inner[2], inner[1], i == 0))
        return found
    if match := _CONVERT.match(line):
        sign, value, bits = match.groups()
        return [f"  call void @emulator_conversion(float {value}, i32 {bits}, i32 {int(sign == 's')})"]
    if _UNKNOWN.search(line):
        raise RefusedError(f"an access that the emulator does not know: {line.strip()}")
    return []


def _access(address: str, size: int | str, align: str, space: str, writes: bool) -> str:
    return f"  call void @emulator_access(ptr {address}, i64 {size}, i32 {align}, i32 {space}, i32 {int(writes)})"


def _size(kind: str, line: str) -> int:
    if vector := re.fullmatch(r"<(\d+) x (\w+)>", kind):
        return int(vector[1]) * _BYTES[vector[2]]
    if kind.startswith("ptr"):
        return 8
    if kind not in _BYTES:
        raise RefusedError(f"an access of a type whose size the emulator does not know: {line.strip()}")
    return _BYTES[kind]


def _flushed(match: re.Match[str]) -> list[str]:
    """A half that was loaded or made of bits, with denormals as zero."""
    name, operation, kind, count = match.groups()
    raw = f"%raw.{name[1:].strip(chr(34))}"
    if count is None:
        return [f"  {raw} = {operation}", f"  {name} = call half @emulator_flush_half(half {raw})"]
    lines, last = [f"  {raw} = {operation}"], raw
    for i in range(int(count)):
        lines.append(f"  {raw}.e{i} = extractelement {kind} {last}, i64 {i}")
        lines.append(f"  {raw}.f{i} = call half @emulator_flush_half(half {raw}.e{i})")
        target = name if i == int(count) - 1 else f"{raw}.v{i}"
        lines.append(f"  {target} = insertelement {kind} {last}, half {raw}.f{i}, i64 {i}")
        last = target
    return lines
