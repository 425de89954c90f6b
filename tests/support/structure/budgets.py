"""How long a file and a function may be."""

from __future__ import annotations

import ast
import re

from tests.support.structure.tree import PACKAGE, Breach, Source, Tree

FILE_LINES = 400
FUNCTION_LINES = 60
COMMAND_LINES = 90
_NOT_COMMANDS = ("__init__", "main", "options")


def files(tree: Tree) -> list[Breach]:
    """At most 400 lines a file, 90 a file of one command."""
    breaches = []
    for source in tree.sources:
        lines = len(source.text.splitlines())
        folder, _, name = source.path.rpartition("/")
        command = folder == f"{PACKAGE}/cli" and name.removesuffix(".py") not in _NOT_COMMANDS
        limit = COMMAND_LINES if command else FILE_LINES
        if lines > limit:
            breaches.append(Breach(source.path, lines, f"{lines} lines; at most {limit}: split it by idea"))
    return breaches


def functions(tree: Tree) -> list[Breach]:
    """At most 60 lines a function, in Python, Metal, C headers and shell. A docstring counts, decorators do not."""
    spans = [(source, *span) for source, parsed in tree.python for span in _python(parsed)]
    for source in tree.sources:
        if source.language != "python":
            spans += [(source, *span) for span in (_c(source) if source.language == "c" else _shell(source))]
    return [
        Breach(source.path, first, f"{name} has {last - first + 1} lines; at most {FUNCTION_LINES}")
        for source, name, first, last in spans
        if last - first + 1 > FUNCTION_LINES
    ]


def _python(parsed: ast.Module) -> list[tuple[str, int, int]]:
    found = [n for n in ast.walk(parsed) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return [(f.name, f.lineno, f.end_lineno or f.lineno) for f in found]


def _shell(source: Source) -> list[tuple[str, int, int]]:
    """Functions written as `name() {` with the closing brace alone in the first column."""
    found, name, first = [], "", 0
    for number, line in enumerate(source.text.splitlines(), 1):
        opening = re.match(r"(\w+)\s*\(\)\s*\{\s*$", line)
        if opening:
            name, first = opening.group(1), number
        elif line.rstrip() == "}" and name:
            found.append((name, first, number))
            name = ""
    return found


def _c(source: Source) -> list[tuple[str, int, int]]:
    """Outermost brace blocks whose head has parentheses, from the line of the name to the closing brace."""
    found, stack = [], []
    head_at = 0
    text = _blank_comments(source.text)
    for at, char in enumerate(text):
        if char == "{":
            head = text[head_at:at]
            inside = any(is_function for is_function, _, _ in stack)
            call = re.search(r"(\w+)\s*\(", head)
            stack.append(
                (
                    call is not None and not inside,
                    call.group(1) if call else "",
                    head_at + (call.start() if call else 0),
                )
            )
            head_at = at + 1
        elif char == "}":
            if stack:
                is_function, name, start = stack.pop()
                if is_function:
                    found.append((name, text.count("\n", 0, start) + 1, text.count("\n", 0, at) + 1))
            head_at = at + 1
        elif char == ";":
            head_at = at + 1
    return found


def _blank_comments(text: str) -> str:
    """Comments, strings and preprocessor lines as blanks; line ends stay."""
    pattern = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|^[ \t]*#(?:\\\n|[^\n])*'
    return re.sub(pattern, lambda m: re.sub(r"[^\n]", " ", m.group()), text, flags=re.DOTALL | re.MULTILINE)
