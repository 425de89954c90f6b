"""Public names, the packaging list and the top level of the repository."""

from __future__ import annotations

import ast
import sys

from tests.support.structure.imports import imports
from tests.support.structure.tree import PACKAGE, Breach, Module, Tree, literals

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it there

TOP_LEVEL = frozenset(
    ("pyproject.toml", "bitnet_mlx", "metal_kernels", "scripts", "tests", "benchmarks", "README.md", "LICENSE")
)
_BUILT = ("build", "dist", "__pycache__")


def top_level(tree: Tree) -> list[Breach]:
    """Nothing but the fixed names, dot-files and build outputs at the root."""
    names = sorted(p.name for p in tree.root.iterdir())
    extra = [n for n in names if n not in TOP_LEVEL and not n.startswith(".") and n not in _BUILT]
    return [Breach(n, 1, "not one of the fixed top-level names") for n in extra if not n.endswith(".egg-info")]


def packages(tree: Tree) -> list[Breach]:
    """pyproject.toml lists every package once."""
    project = tomllib.loads((tree.root / "pyproject.toml").read_text(encoding="utf-8"))
    listed = project["tool"]["setuptools"]["packages"]
    there = sorted(name for name, module in tree.modules.items() if module.is_package)
    missing = [f"package {name} is not listed in [tool.setuptools]" for name in there if name not in listed]
    gone = [f"package {name} is listed and has no __init__.py" for name in listed if name not in there]
    twice = [f"package {name} is listed twice" for name in sorted(set(listed)) if listed.count(name) > 1]
    in_none = [
        Breach(m.path, 1, "lies in a folder without __init__.py, which a wheel leaves out")
        for name, m in tree.modules.items()
        if "." in name and name.rpartition(".")[0] not in tree.modules
    ]
    return [Breach("pyproject.toml", 1, text) for text in missing + gone + twice] + in_none


def public(tree: Tree) -> list[Breach]:
    """The exports: __all__, the table of homes and the imports for type checkers agree, and the names exist."""
    root = tree.modules[PACKAGE]
    values = literals(root.tree)
    exported, homes = values.get("__all__", []), values.get("_HOME", {})
    texts = []
    if list(exported) != sorted(set(exported)):
        texts.append("__all__ is unsorted or names something twice")
    texts += [f"{name} is in one of __all__ and _HOME only" for name in sorted(set(exported) ^ set(homes))]
    typed = {
        n: i.target for i in imports(root.tree) if i.when == "typing" for n in i.names if i.target.startswith(PACKAGE)
    }
    texts += [
        f"{n}: type checkers see {typed.get(n)}, users {home}" for n, home in homes.items() if typed.get(n) != home
    ]
    for name, home in homes.items():
        if home not in tree.modules:
            texts.append(f"{name}: there is no module {home}")
        elif name not in _defined(tree.modules[home]):
            texts.append(f"{name}: {home} does not define it")
    return [Breach(root.path, 1, text) for text in texts]


def one_home(tree: Tree) -> list[Breach]:
    """A class that the package exports is defined in one module alone."""
    homes = literals(tree.modules[PACKAGE].tree).get("_HOME", {})
    breaches = []
    for module in tree.modules.values():
        for node in module.tree.body:
            name = node.name if isinstance(node, ast.ClassDef) else ""
            home = homes.get(name, module.name)
            if module.name != home and not module.name.startswith(f"{home}."):
                breaches.append(Breach(module.path, node.lineno, f"{name} is the name of another in {home}"))
    return breaches


def _defined(module: Module) -> set[str]:
    """Names that a module defines or imports at its top level."""
    names = set()
    for node in module.tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {a.asname or a.name for a in node.names}
        elif isinstance(node, ast.Assign):
            names |= {t.id for t in node.targets if isinstance(t, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names
