"""transformers on a folder that `bitnet-mlx train` wrote, against this package's specification decoder.

BITNET_ORACLE_PYTHON names a python with torch and transformers.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitnet_mlx.checkpoint.read import read_weights
from bitnet_mlx.models.decoder_numpy import NumpyDecoder
from bitnet_mlx.quality.agreement import Trace, compare, record
from bitnet_mlx.train import tokenizer as bpe
from bitnet_mlx.train.loop import train
from tests.train.support import options, silent, write_texts

pytestmark = pytest.mark.oracle
SCRIPT = Path(__file__).with_name("transformers_forward.py")


@pytest.mark.parametrize("quantise", [True, False])
def test_the_exported_folder(tmp_path: Path, quantise: bool) -> None:
    out, tokens = tmp_path / "model", [int(t) for t in np.random.default_rng(0).integers(1, 300, 60)]
    train(options(write_texts(tmp_path / "texts"), out, iters=40, quantise=quantise, seq_length=64), silent)
    python = os.environ.get("BITNET_ORACLE_PYTHON", sys.executable)
    command: list[Any] = [python, SCRIPT, out, tmp_path / "golden.npz", *tokens]
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"set BITNET_ORACLE_PYTHON to a python with torch:\n{done.stderr}"
    with np.load(tmp_path / "golden.npz") as file:
        codes = {key.removeprefix("codes/"): file[key] for key in file.files if key.startswith("codes/")}
        reference = Trace(file["logits"], np.arange(len(tokens)), codes, layers=2)
        ids = file["ids"].tolist()
    assert bool(codes) == quantise
    result = compare(reference, record(NumpyDecoder(read_weights(out)), tokens), margin=0.05)
    print(result)
    assert result.max_difference_where_codes_agree < 1e-4, result
    assert result.greedy_equal_above_margin, result
    assert 2 * result.untouched > result.positions, result
    assert bpe.load(out).encode("def f(x):\n    return x + 12  # é\n").ids == ids
