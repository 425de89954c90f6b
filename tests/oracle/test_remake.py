"""Make the goldens again with torch and transformers, and compare them with the committed ones.

    BITNET_ORACLE_PYTHON=/path/to/python/with/torch python -m pytest -m oracle tests/oracle

transformers differs from itself by version, by thread count and between its two attentions: its codes flip as ours do.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bitnet_mlx.quality.agreement import Agreement, Trace, compare
from tests.golden import check, store
from tests.golden.cases import CASES

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.oracle

# Flips that no other flip caused, over all cases together. Counted on x86 with torch 2.13 and transformers 5.24: none
# on a second run with sdpa, which gave the same bits; with eager attention 3 rows of bitnet-long, logits within 2.5e-5.
ALLOWED = {"sdpa": 4, "eager": 12}


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def remade(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """(attention, folder of the goldens made with it)."""
    python = os.environ.get("BITNET_ORACLE_PYTHON", sys.executable)
    out = tmp_path_factory.mktemp(request.param)
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    command = [python, str(ROOT / "tests/oracle/make_goldens.py"), "--out", str(out), "--attention", request.param]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, (
        f"{' '.join(command)} failed; set BITNET_ORACLE_PYTHON to a python with torch:\n{done.stderr}"
    )
    return request.param, out


def full(golden: store.Golden, name: str) -> Trace:
    return Trace(golden.logits, golden.positions, golden.codes, CASES[name].config["num_hidden_layers"])


def results(folder: Path) -> dict[str, Agreement]:
    return {name: compare(check.reference(name), full(store.load(name, folder), name), check.MARGIN) for name in CASES}


def test_the_checkpoints_are_the_same_bytes(remade: tuple[str, Path]) -> None:
    assert store.manifest(remade[1])["checkpoints"] == store.manifest()["checkpoints"]


def test_logits_codes_and_greedy_tokens(remade: tuple[str, Path]) -> None:
    attention, folder = remade
    found = results(folder)
    report = "\n".join(f"{name}: {result}" for name, result in found.items())
    print(report)
    assert sum(result.roots for result in found.values()) <= ALLOWED[attention], report
    for name, result in found.items():
        tolerance = check.TOLERANCE if store.load(name).codes else check.FLOAT_TOLERANCE
        assert result.max_difference_where_codes_agree <= tolerance, report
        assert result.greedy_equal_above_margin, report


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.greedy])
def test_generated_tokens(remade: tuple[str, Path], name: str) -> None:
    """Equal up to a step whose margin is below the stated one."""
    again, golden = store.load(name, remade[1]), store.load(name)
    differs = np.flatnonzero(again.greedy != golden.greedy)
    assert not len(differs) or golden.greedy_margin[differs[0]] <= check.MARGIN
