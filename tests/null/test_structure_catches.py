"""Each structural rule finds what it is for: one breach planted in a small sound tree."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.structure import RULES
from tests.support.structure.budgets import FILE_LINES, FUNCTION_LINES
from tests.support.structure.tree import Tree

PACKAGES = """
[tool.setuptools]
packages = ["bitnet_mlx", "bitnet_mlx.cli", "bitnet_mlx.nn", "bitnet_mlx.metal_kernels"]
"""
EXPORTS = """
from typing import TYPE_CHECKING
_HOME = {'Words': 'bitnet_mlx.ternary'}
__all__ = ['Words']
if TYPE_CHECKING:
    from bitnet_mlx.ternary import Words
"""
MAIN = """
def main(arguments):
    from importlib import import_module
    if arguments[0] != '--help':
        import_module('bitnet_mlx.cli.' + arguments[0]).add_arguments(None)
"""
SOUND = {
    "pyproject.toml": PACKAGES,
    "bitnet_mlx/__init__.py": EXPORTS,
    "bitnet_mlx/errors.py": "class FormatError(Exception): ...\n",
    "bitnet_mlx/ternary.py": "from bitnet_mlx.errors import FormatError\nclass Words: ...\n",
    "bitnet_mlx/cli/__init__.py": "",
    "bitnet_mlx/cli/main.py": MAIN,
    "bitnet_mlx/cli/chat.py": "def add_arguments(parser): ...\n",
    "bitnet_mlx/nn/__init__.py": "",
    "bitnet_mlx/nn/linear.py": "import mlx.core as mx\n",
    "metal_kernels/__init__.py": "",
    "metal_kernels/qmv.h": "template <typename T> void qmv(T x) {\n  for (;;) {\n  }\n}\n",
    "scripts/demo": "#!/bin/sh\necho hello\n",
}


def plant(root: Path, changes: dict[str, str]) -> Tree:
    """The sound tree with some files written over or added to ("+...")."""
    files = dict(SOUND)
    for path, text in changes.items():
        files[path] = files.get(path, "") + text[1:] if text.startswith("+") else text
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")
    return Tree(root)


@pytest.mark.parametrize("rule", list(RULES))
def test_the_sound_tree_passes(tmp_path: Path, rule: str) -> None:
    assert RULES[rule](plant(tmp_path, {})) == []


LINEAR, TERNARY, ERRORS = "bitnet_mlx/nn/linear.py", "bitnet_mlx/ternary.py", "bitnet_mlx/errors.py"
CHAT, ROOT = "bitnet_mlx/cli/chat.py", "bitnet_mlx/__init__.py"
TRIED = "+try:\n    import numba\nexcept ImportError:\n    pass\n"
BY_NAME = "+import importlib\nimportlib.import_module('bitnet_mlx.nn')\n"
UNTYPED = "_HOME = {'Words': 'bitnet_mlx.ternary'}\n__all__ = ['Words']\n"
LONG_FUNCTION = "def f():\n" + "    x = 1\n" * FUNCTION_LINES
LONG_METAL = "+void big(int a)\n{\n" + "  a += 1;\n" * FUNCTION_LINES + "}\n"
LONG_SHELL = "#!/bin/sh\nbig() {\n" + "    echo 1\n" * FUNCTION_LINES + "}\n"
BREACHES = [
    ("absolute imports", LINEAR, "from . import other\n", "relative"),
    ("import direction", TERNARY, "+from bitnet_mlx.nn import linear\n", "nn is above ternary"),
    ("import direction", TERNARY, "+def f():\n    import bitnet_mlx.cli.main\n", "cli is above ternary"),
    ("import direction", TERNARY, BY_NAME, "nn is above"),
    ("import direction", "bitnet_mlx/memory/plan.py", "import bitnet_mlx.ternary\n", "memory may import errors only"),
    ("import direction", ERRORS, "+from bitnet_mlx import Words\n", "ternary is above errors"),
    ("import direction", LINEAR, "import bitnet_mlx\n", "where the name is defined"),
    ("import direction", "bitnet_mlx/rest/__init__.py", "", "room 'rest' has no level"),
    ("import circles", ERRORS, "from bitnet_mlx.ternary import Words\n", "errors -> bitnet_mlx.ternary ->"),
    ("late packages", TERNARY, TRIED, "numba at load"),
    ("late packages", CHAT, "+from bitnet_mlx.nn import linear\n", "mlx at load through bitnet_mlx.nn.linear"),
    ("late packages", LINEAR, "import transformers\n", "transformers at load"),
    ("mlx_lm in one place", LINEAR, "def f():\n    import mlx_lm\n", "_mlxlm.py alone"),
    ("mlx_lm in one place", "bitnet_mlx/_mlxlm.py", "import mlx_lm.utils\n", "inside a function"),
    ("file length", "tests/test_long.py", "x = 1\n" * (FILE_LINES + 1), "401 lines; at most 400"),
    ("file length", "metal_kernels/long.metal", "\n" * (FILE_LINES + 1), "401 lines; at most 400"),
    ("file length", CHAT, "x = 1\n" * 91, "91 lines; at most 90"),
    ("function length", "benchmarks/bench.py", LONG_FUNCTION, "f has 61 lines; at most 60"),
    ("function length", "metal_kernels/qmv.h", LONG_METAL, "big has 63 lines; at most 60"),
    ("function length", "scripts/demo", LONG_SHELL, "big has 62 lines; at most 60"),
    ("import does nothing", LINEAR, "+mx.set_default_device(mx.cpu)\n", "calls mx.set_default_device"),
    ("import does nothing", LINEAR, "+class A:\n    one = mx.array(1)\n", "calls mx.array"),
    ("import does nothing", LINEAR, "+def f(x=mx.zeros(3)): ...\n", "calls mx.zeros"),
    ("import does nothing", TERNARY, "+import os\nos.environ['X'] = '1'\n", "changes the environment"),
    ("top level", "notes.md", "x", "not one of the fixed"),
    ("packaging list", "bitnet_mlx/serve/__init__.py", "", "bitnet_mlx.serve is not listed"),
    ("packaging list", "bitnet_mlx/assets/make.py", "", "without __init__.py"),
    ("packaging list", "pyproject.toml", PACKAGES.replace("cli", "gone"), "bitnet_mlx.gone is listed and has"),
    ("public names", TERNARY, "class Renamed: ...\n", "bitnet_mlx.ternary does not define it"),
    ("public names", ROOT, "_HOME = {}\n__all__ = ['Words']\n", "in one of __all__ and _HOME only"),
    ("public names", ROOT, UNTYPED, "type checkers see"),
    ("one home a name", LINEAR, "+class Words: ...\n", "Words is the name of another"),
    ("imports without heavy packages", ERRORS, "+__import__('nu' + 'mba')\n", "numba is refused here"),
    ("light start", ROOT, "+import numpy\n", "import bitnet_mlx loads numpy"),
    ("light start", "bitnet_mlx/cli/main.py", "+import numpy\n", "bitnet-mlx --help loads numpy"),
    ("light commands", CHAT, "+import tokenizers\n", "bitnet-mlx chat --help loads tokenizers"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "path", "text", "told"), BREACHES, ids=[f"{b[0]}-{n}" for n, b in enumerate(BREACHES)]
)
def test_a_planted_breach_is_found(tmp_path: Path, rule: str, path: str, text: str, told: str) -> None:
    found = RULES[rule](plant(tmp_path, {path: text}))
    assert any(told in breach.text for breach in found), found


def test_every_rule_has_a_planted_breach() -> None:
    assert {breach[0] for breach in BREACHES} == set(RULES)


def test_a_call_inside_a_function_or_under_main_is_no_effect_of_importing(tmp_path: Path) -> None:
    text = "+def f():\n    print(1)\n    return lambda: mx.array(1)\nif __name__ == '__main__':\n    print(f())\n"
    text += "g = mx.compile(f)\n"
    assert RULES["import does nothing"](plant(tmp_path, {"bitnet_mlx/nn/linear.py": text})) == []
