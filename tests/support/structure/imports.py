"""Which module imports which, when, and whether the arrows point one way."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from typing import NamedTuple

from tests.support.structure.tree import PACKAGE, Breach, Module, Tree, literals

# A room may import rooms of its own level and below; modules never load each other in a circle.
LEVELS = (
    ("errors",),
    ("ternary", "formats", "memory", "profile", "metal_kernels", "_mlxlm"),
    ("backends",),
    ("nn",),
    ("models",),
    ("checkpoint", "tokenizer"),
    ("generation", "api"),
    ("quality", "calibration", "train", "bench", "serve"),
    ("doctor", "cli"),
    ("__main__",),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
ERRORS_ONLY = ("memory", "profile", "metal_kernels", "_mlxlm")

# Packages that a module may not import when it is itself imported, and the modules that are made of them.
LATE = frozenset(
    """
    mlx numba llvmlite mlx_lm transformers torch tokenizers sentencepiece jinja2 safetensors huggingface_hub
    rich psutil gguf lm_eval matplotlib pydantic starlette uvicorn llguidance
    """.split()
)
MADE_OF = {
    "bitnet_mlx.nn*": ("mlx",),
    "bitnet_mlx.train*": ("mlx",),
    "bitnet_mlx.*_mlx": ("mlx",),
    "bitnet_mlx.backends.mlx_*": ("mlx",),
    "bitnet_mlx.backends.metal*": ("mlx",),
    "bitnet_mlx.backends.cuda*": ("mlx",),
    "bitnet_mlx.backends.kernels*": ("mlx",),
    "bitnet_mlx.backends.cpu_jit*": ("numba", "llvmlite"),
    "bitnet_mlx.serve*": ("pydantic", "starlette", "uvicorn"),
}


class Import(NamedTuple):
    """when: "load" (as the module is imported), "late" (inside a function) or "typing" (for type checkers only)."""

    target: str
    names: tuple[str, ...]
    line: int
    when: str


@cache
def imports(tree: ast.Module) -> list[Import]:
    """Every import of a module, with `import_module("...")` and `__import__("...")` of a constant name."""
    return list(_walk(tree.body, "load"))


def _walk(nodes: list[ast.AST] | list[ast.stmt], when: str) -> Iterator[Import]:
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, (), node.lineno, when)
        elif isinstance(node, ast.ImportFrom):
            yield Import(node.module or "", tuple(a.name for a in node.names), node.lineno, when)
        elif isinstance(node, ast.Call) and _importer(node):
            yield Import(_constant(node), (), node.lineno, when)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _walk([*node.decorator_list, node.args], when)
            yield from _walk(node.body, "typing" if when == "typing" else "late")
        elif isinstance(node, ast.Lambda):
            yield from _walk([node.body], "typing" if when == "typing" else "late")
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from _walk(node.body, "typing")
            yield from _walk(node.orelse, when)
        else:
            yield from _walk(list(ast.iter_child_nodes(node)), when)


def _importer(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    return name in ("import_module", "__import__") and bool(_constant(call))


def _constant(call: ast.Call) -> str:
    value = call.args[0].value if call.args and isinstance(call.args[0], ast.Constant) else ""
    return value if isinstance(value, str) else ""


def room(name: str) -> str:
    """bitnet_mlx.models.config -> models; bitnet_mlx itself -> ""."""
    return name.split(".")[1] if "." in name else ""


def internal_targets(found: Import, modules: dict[str, Module]) -> list[str]:
    """The modules of the package that one import names.

    `from bitnet_mlx.formats import words2` is formats.words2; `from bitnet_mlx import load` is the home of load.
    """
    if found.target.split(".")[0] != PACKAGE:
        return []
    homes = literals(modules[PACKAGE].tree).get("_HOME", {}) if found.target == PACKAGE and PACKAGE in modules else {}
    below = [homes.get(name, f"{found.target}.{name}") for name in found.names]
    return [m if m in modules or m in homes.values() else found.target for m in below] or [found.target]


def direction(tree: Tree) -> list[Breach]:
    """Imports point one way: errors <- ternary, formats <- backends <- nn <- models <- ... <- cli."""
    breaches = []
    for module in tree.modules.values():
        here = room(module.name)
        if here and here not in LEVEL:
            breaches.append(Breach(module.path, 1, f"room {here!r} has no level; give it one in {__name__}"))
            continue
        for found in imports(module.tree):
            for target in internal_targets(found, tree.modules):
                problem = _problem(here, target, found) if here else ""
                if problem:
                    breaches.append(Breach(module.path, found.line, f"{module.name} imports {target}: {problem}"))
    return breaches


def _problem(here: str, target: str, found: Import) -> str:
    there = room(target)
    if not there:
        ours = [n for n in found.names if not n.startswith("__")]
        return "" if found.names and not ours else "import from where the name is defined"
    if there not in LEVEL:
        return f"room {there!r} has no level"
    if here in ERRORS_ONLY and there not in ("errors", here):
        return f"{here} may import errors only"
    if LEVEL[there] > LEVEL[here]:
        return f"{there} is above {here}"
    return ""


def circles(tree: Tree) -> list[Breach]:
    """No module loads itself through others."""
    arrows = {name: _arrows(module, tree.modules) for name, module in tree.modules.items()}
    breaches, done = [], set()
    for start in sorted(arrows):
        path = _path_back(start, arrows)
        if path and frozenset(path) not in done:
            done.add(frozenset(path))
            breaches.append(Breach(tree.modules[start].path, 1, "imports in a circle: " + " -> ".join(path)))
    return breaches


def _arrows(module: Module, modules: dict[str, Module]) -> set[str]:
    found = [f for f in imports(module.tree) if f.when == "load"]
    targets = {t for f in found for t in internal_targets(f, modules)}
    return {t for t in targets if t in modules and t not in (module.name, PACKAGE)}


def _path_back(start: str, arrows: dict[str, set[str]]) -> list[str]:
    """The shortest way from start to start, or []."""
    queue, seen = [[start]], {start}
    while queue:
        path = queue.pop(0)
        for target in sorted(arrows[path[-1]]):
            if target == start:
                return [*path, start]
            if target not in seen:
                seen.add(target)
                queue.append([*path, target])
    return []


def allowed_at_load(name: str) -> set[str]:
    """The packages that a module is made of and may import at once."""
    return {package for pattern, made in MADE_OF.items() if fnmatchcase(name, pattern) for package in made}


def late_packages(tree: Tree) -> list[Breach]:
    """Importing a module imports none of LATE, itself or through others, but for what it is made of."""
    breaches = []
    for module in tree.modules.values():
        forbidden = LATE - allowed_at_load(module.name)
        for through, found in _loaded(module.name, tree.modules):
            top = found.target.split(".")[0]
            if top in forbidden:
                where = "" if through == module.name else f" through {through}"
                line = found.line if through == module.name else 1
                breaches.append(
                    Breach(module.path, line, f"{module.name} imports {top} at load{where}; import it late")
                )
    return breaches


def _loaded(name: str, modules: dict[str, Module]) -> list[tuple[str, Import]]:
    """(module, import) for all that importing a module runs: itself, its parents, and theirs."""
    queue, seen, found = [name], {name}, []
    while queue:
        module = modules[queue.pop()]
        at_load = [i for i in imports(module.tree) if i.when == "load"]
        found += [(module.name, i) for i in at_load]
        targets = [t for i in at_load for t in internal_targets(i, modules)]
        parts = module.name.split(".")
        targets += [".".join(parts[:n]) for n in range(1, len(parts))]
        for target in targets:
            if target in modules and target not in seen:
                seen.add(target)
                queue.append(target)
    return found


def only_mlxlm(tree: Tree) -> list[Breach]:
    """mlx_lm is imported by _mlxlm.py alone, and late: that takes a second and changes a process limit."""
    found = [(m, i) for m in tree.modules.values() for i in imports(m.tree) if i.target.split(".")[0] == "mlx_lm"]
    return [
        Breach(module.path, i.line, "mlx_lm is imported by _mlxlm.py alone, inside a function")
        for module, i in found
        if module.name != f"{PACKAGE}._mlxlm" or i.when == "load"
    ]


def no_relative(tree: Tree) -> list[Breach]:
    """Imports inside the package are absolute; the other rules read no relative ones."""
    nodes = [(m, n) for m in tree.modules.values() for n in ast.walk(m.tree)]
    return [
        Breach(module.path, node.lineno, "relative import; write bitnet_mlx. in full")
        for module, node in nodes
        if isinstance(node, ast.ImportFrom) and node.level
    ]
