"""The structural rules of the project, each a function from a Tree to its breaches.

`python -m tests.support.structure [ROOT]` prints every breach and exits 1 if there is one. tests/null runs the same
rules.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.support.structure import budgets, effects, imports, names, runtime
from tests.support.structure.tree import Breach, Tree

RULES: dict[str, Callable[[Tree], list[Breach]]] = {
    "absolute imports": imports.no_relative,
    "import direction": imports.direction,
    "import circles": imports.circles,
    "late packages": imports.late_packages,
    "mlx_lm in one place": imports.only_mlxlm,
    "file length": budgets.files,
    "function length": budgets.functions,
    "import does nothing": effects.at_load,
    "top level": names.top_level,
    "packaging list": names.packages,
    "public names": names.public,
    "one home a name": names.one_home,
    "imports without heavy packages": runtime.without_late_packages,
    "light start": runtime.light_start,
    "light commands": runtime.light_commands,
}
