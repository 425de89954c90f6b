"""Metal text in the words of C++ for OpenCL: what clang does not take as Metal does is rewritten."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.emulator.instrument import RefusedError

# A declaration of one or more threadgroup variables at the start of a statement: no pointer, no reference, no value.
_DECLARATION = re.compile(
    r"(?P<before>[;{}]\s*(?:#[^\n]*\n\s*)*)(?P<align>alignas\([^;()]*\)\s*)?(?:threadgroup|__local)\s+"
    r"(?P<align2>alignas\([^;()]*\)\s*)?(?P<type>(?:const\s+)?(?:\w+::)*\w+(?:\s*<[^;{}()=]*?>)?)\s+"
    r"(?P<names>\w+\s*(?:\[[^;=]*\])*\s*(?:,\s*\w+\s*(?:\[[^;=,]*\])*\s*)*);"
)
_LITERAL = re.compile(r"(?<![\w.])((?:\d+\.\d*|\.\d+)(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+)(?![\w.])")
_SIGNATURE = re.compile(r"\[\[kernel\]\] void (\w+)\(\n(.*?)\) \{\n", re.DOTALL)
_PARAMETER = re.compile(r"^\s*(?:const )?(?P<space>constant|device)? ?(?P<type>\w+)(?P<mark>[*&]?) (?P<name>\w+) \[\[")
_INSTANCE = re.compile(r"^template \[\[host_name\(.*?\)\]\] \[\[kernel\]\] decltype\((.*?)\) .*;$", re.MULTILINE)


@dataclass(frozen=True)
class Parameter:
    """One parameter of a generated kernel. space: "device", "constant" or "" for a position."""

    space: str
    type: str
    mark: str
    name: str


def signature(text: str) -> tuple[str, list[Parameter]]:
    """(the kernel as an expression, with its template's values; its parameters) of a text that MLX generated."""
    match = _SIGNATURE.search(text)
    assert match, "the text has no kernel"
    parameters = []
    for line in match[2].split(",\n"):
        found = _PARAMETER.match(line)
        assert found, f"a parameter that the emulator does not know: {line}"
        parameters.append(Parameter(found["space"] or "", found["type"], found["mark"], found["name"]))
    instance = _INSTANCE.search(text)
    return (instance[1] if instance else match[1]), parameters


def with_entry(text: str, positions: dict[str, tuple[str, int]]) -> str:
    """The text, and a function `emulator_entry` that calls its kernel with addresses and positions out of two arrays."""
    call, parameters = signature(text)
    arguments, buffers = [], 0
    for p in parameters:
        if p.space:
            pointer = f"({p.space} {p.type}*)addresses[{buffers}]"
            arguments.append(pointer if p.mark == "*" else f"*({pointer})")
            buffers += 1
        else:
            kind, at = positions[p.name]
            value = ", ".join(f"positions[{at + i}]" for i in range(3 if kind == "uint3" else 1))
            arguments.append(f"uint3({value})" if kind == "uint3" else value)
    body = _INSTANCE.sub("", text)
    return (
        f'{body}\nextern "C" void emulator_entry(const thread ulong* addresses, const thread uint* positions) {{\n'
        f"  {call}({', '.join(arguments)});\n}}\n"
    )


def rewritten(text: str) -> str:
    """Text that clang compiles: literals are float, threadgroup variables live in the runtime's memory."""
    text = re.sub(r"\b((?:constant|__constant) bool \w+) \[\[function_constant\(\d+\)\]\];", r"\1 = false;", text)
    text = _plain_constructors(text)
    lines = [_literals(line) for line in text.splitlines()]
    return threadgroup_memory("\n".join(lines) + "\n")


def _plain_constructors(text: str) -> str:
    """Constructors without their `thread`: clang makes no temporary of a class whose constructor names it."""
    classes = set(re.findall(r"\b(?:struct|class)\s+(\w+)", text))
    out, last = [], 0
    for match in re.finditer(r"\)\s*(?:__private|thread)\b(?=\s*[:{])", text):
        depth, at = 0, match.start()
        while at >= 0:
            depth += (text[at] == ")") - (text[at] == "(")
            if depth == 0:
                break
            at -= 1
        name = re.search(r"(\w+)\s*$", text[max(0, at - 80) : at])
        if name and name[1] in classes:
            out.append(text[last : match.start() + 1])
            last = match.end()
    return "".join([*out, text[last:]])


def _literals(line: str) -> str:
    """1.0 is a float in Metal: clang's own option for it is lost in templates."""
    if '"' in line or (line.startswith("#") and not line.startswith("#define")):
        return line
    return _LITERAL.sub(r"\1f", line)


def threadgroup_memory(text: str) -> str:
    """Local threadgroup variables become references to memory that the runtime hands out."""
    number = 0

    def replace(match: re.Match[str]) -> str:
        nonlocal number
        align = (match["align"] or match["align2"] or "").strip()
        out = match["before"]
        for declarator in _split(match["names"]):
            name = re.match(r"\w+", declarator)[0]  # type: ignore[index]
            sizes = declarator[len(name) :].strip()
            kind = f"emulator_{name}_{number}"
            out += (
                f"typedef {match['type']} {kind}{sizes}; __local {kind}& {name} = *(__local {kind}*)emulator_slot("
                f'"{name}", {number}, sizeof({kind}), {_alignment(align, kind)});'
            )
            number += 1
        return out

    previous = None
    while previous != text:  # declarations that follow one another share the semicolon between them
        previous, text = text, _DECLARATION.sub(replace, text)
    return text


def _alignment(align: str, kind: str) -> str:
    return f"alignof({kind})" if not align else align.removeprefix("alignas(").removesuffix(")")


def _split(names: str) -> list[str]:
    """Declarators, split at commas outside brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(names):
        depth += (c in "[<(") - (c in "]>)")
        if c == "," and depth == 0:
            parts.append(names[start:i].strip())
            start = i + 1
    return [*parts, names[start:].strip()]


_POINTER = re.compile(
    r"(?P<words>(?:\b(?:const|thread|device|constant|threadgroup|inline|static|constexpr|typename|METAL_FUNC)\s+|metal::)*)"
    r"\b(?P<type>\w+)(?:\s*<[^<>;(){}]*>)?\s*(?:const\s*)?(?P<mark>[*&]+)\s*(?:const\s+)?(?P<name>\w+)\s*(?=[,)=;:\[(])"
)
_SCALARS = "float half bfloat bfloat16_t float16_t bool auto size_t"
_TYPES = {
    f"{t}{n}" for t in "char uchar short ushort int uint long ulong half float bfloat".split() for n in ("", 2, 3, 4)
}
_TYPES |= {f"{u}int{n}_t" for u in ("", "u") for n in (8, 16, 32, 64)} | set(_SCALARS.split())


_NOT_METAL = re.compile(
    r"\b(goto|throw|try|catch|new|delete|virtual|dynamic_cast|typeid|thread_local|noexcept|register|asm)\b|(\[[&=]?\]\s*\()"
)


def check_metal(text: str) -> None:
    """Raise RefusedError for what Metal's language lacks and clang takes, in a text that MLX generated."""
    check_qualifiers(text)
    if match := _NOT_METAL.search(text):
        raise RefusedError(f"Metal has no {match[1] or 'lambda'}")
    if match := _DECLARATION.search(text[: text.find("[[kernel]]")]):
        raise RefusedError(f"threadgroup memory outside a kernel: {match[0].strip(' ;{}')!r}")


def check_qualifiers(text: str) -> None:
    """Raise RefusedError for a pointer or reference with no address space: Metal wants one, clang takes it for `thread`."""
    known = set(_TYPES)
    known |= set(re.findall(r"\btypename\s+(\w+)", text))
    known |= set(re.findall(r"\b(?:struct|class|using)\s+(\w+)", text))
    known |= set(re.findall(r"\btypedef\b[^;]*?(\w+)\s*(?:\[[^;]*\])?;", text))
    for match in _POINTER.finditer(text):
        if match["type"] not in known:
            continue
        words = match["words"].split()
        trailing = text[: match.start()].rstrip()[-12:].split()
        before = set(words) | set(trailing[-1:])
        if not before & {"thread", "device", "constant", "threadgroup", "threadgroup_imageblock"}:
            raise RefusedError(f"a pointer or reference without an address space: {match[0].strip()!r}")
