"""Make torch's numbers for training again, and compare them with the committed ones.

BITNET_ORACLE_PYTHON=/path/to/python/with/torch python -m pytest -m oracle tests/oracle/test_remake_train.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.oracle
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["qat", "ste", "distill", "lora"])
def test_torchs_numbers(name: str, tmp_path: Path) -> None:
    python, made = os.environ.get("BITNET_ORACLE_PYTHON", sys.executable), tmp_path / "made.npz"
    command = [python, str(ROOT / f"tests/oracle/make_{name}_goldens.py"), str(made)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"set BITNET_ORACLE_PYTHON to a python with torch:\n{done.stderr}"
    with np.load(made) as again, np.load(ROOT / f"tests/train/data/{name}_torch.npz") as kept:
        assert again.files == kept.files
        for key in kept.files:
            np.testing.assert_allclose(again[key], kept[key], rtol=1e-5, atol=1e-6, err_msg=key)
