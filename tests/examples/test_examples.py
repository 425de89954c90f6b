"""The examples run as they stand, from a user's folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bitnet_mlx.backends import choose
from tests.support import notebook

EXAMPLES = Path(__file__).resolve().parents[2] / "scripts" / "examples"


def test_profile_generation(tmp_path: Path) -> None:
    script = EXAMPLES / "profile_generation.py"
    assert len(script.read_text().splitlines()) < 60
    command = [sys.executable, str(script), "--backend", "cpu", "--tokens", "6", "--folder", str(tmp_path)]
    env = {"PYTHONPATH": os.pathsep.join([str(EXAMPLES.parents[1]), os.environ["PYTHONPATH"]])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    for word in ("gate_up", "bottleneck: ", "optimisation: ", "memory: flat"):
        assert word in done.stdout
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_the_notebook_runs_and_shows_what_it_holds() -> None:
    path = EXAMPLES / "quickstart.ipynb"
    held = notebook.cells(path)
    kinds = [_shown(cell) for cell in held["cells"]]
    assert sum("text/html" in kind for kind in kinds) == 4, "execute it: python -m tests.support.notebook FILE"
    ran = notebook.run(notebook.cells(path))
    assert [_shown(cell) for cell in ran["cells"]] == kinds
    text = "".join(ran["cells"][2]["outputs"][0]["text"])
    assert text.startswith("def read_config(path):")
    if choose("auto").name in ("cpu", "numpy"):  # a GPU may part from it at a near-tie
        assert text == "".join(held["cells"][2]["outputs"][0]["text"])


def _shown(cell: dict) -> list[str]:
    """Kinds of a cell's outputs."""
    return [k for o in cell.get("outputs", []) for k in ([o["output_type"]] if "text" in o else sorted(o["data"]))]


@pytest.mark.parametrize("damage", ['{"nbformat": 3, "metadata": {}, "cells": []}',
                                    '{"nbformat": 4, "metadata": {}, "cells": [{"cell_type": "code"}]}'])  # fmt: skip
def test_a_damaged_notebook_is_refused(damage: str, tmp_path: Path) -> None:
    (tmp_path / "a.ipynb").write_text(damage)
    with pytest.raises(ValueError, match="a.ipynb"):
        notebook.cells(tmp_path / "a.ipynb")


def test_an_error_in_a_cell_is_an_error() -> None:
    code = {"cell_type": "code", "id": "a", "metadata": {}, "execution_count": None, "outputs": [], "source": ["1 / 0"]}
    with pytest.raises(ZeroDivisionError):
        notebook.run({"cells": [code]})
