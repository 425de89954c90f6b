"""The structural rules hold for this project, and the frame around them works."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.structure import RULES
from tests.support.structure.tree import Tree

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def project() -> Tree:
    return Tree(ROOT)


@pytest.mark.parametrize("rule", list(RULES))
def test_rule_holds(project: Tree, rule: str) -> None:
    breaches = RULES[rule](project)
    assert not breaches, "\n".join(map(str, breaches))


def test_the_tree_sees_the_project(project: Tree) -> None:
    paths = {source.path: source.language for source in project.sources}
    assert paths["scripts/demo"] == paths[".ci/run"] == paths["scripts/_venv.sh"] == "shell"
    assert paths["tests/null/test_structure.py"] == paths["scripts/_venv.py"] == "python"
    assert {"bitnet_mlx", "bitnet_mlx.ternary", "bitnet_mlx.metal_kernels"} <= set(project.modules)


def test_as_a_command_it_prints_breaches_and_fails(tmp_path: Path) -> None:
    (tmp_path / "bitnet_mlx").mkdir()
    (tmp_path / "bitnet_mlx" / "__init__.py").write_text('__all__ = []\n_HOME = {}\nprint("hello")\n')
    (tmp_path / "pyproject.toml").write_text('[tool.setuptools]\npackages = ["bitnet_mlx"]\n')
    command = [sys.executable, "-m", "tests.support.structure", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert "bitnet_mlx/__init__.py:3: calls print while bitnet_mlx is imported [import does nothing]" in done.stdout
