"""transformers on a folder that `bitnet-mlx train` or `qat` wrote, against this package's specification decoder.

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
from bitnet_mlx.quality.agreement import Agreement, Trace, compare, record
from bitnet_mlx.train import tokenizer as bpe
from bitnet_mlx.train.fuse import fuse
from bitnet_mlx.train.fuse_options import FuseOptions
from bitnet_mlx.train.loop import train
from bitnet_mlx.train.qat import qat
from tests.train.support import options, qat_options, silent, write_texts
from tests.train.test_fuse import base_folder, write_adapter

pytestmark = pytest.mark.oracle
SCRIPT = Path(__file__).with_name("transformers_forward.py")


def check(out: Path, kind: str, tokens: list[int], golden: Path) -> tuple[Agreement, dict[str, Any]]:
    """transformers' run of a folder as a model of class `kind`, compared with ours; and what it saved."""
    python = os.environ.get("BITNET_ORACLE_PYTHON", sys.executable)
    command: list[Any] = [python, SCRIPT, out, golden, *tokens]
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"set BITNET_ORACLE_PYTHON to a python with torch:\n{done.stderr}"
    with np.load(golden) as file:
        saved = dict(file)
    assert str(saved["kind"]) == kind and not len(saved["unread"]), saved["unread"]
    codes = {key.removeprefix("codes/"): value for key, value in saved.items() if key.startswith("codes/")}
    reference = Trace(saved["logits"], np.arange(len(tokens)), codes, layers=2)
    result = compare(reference, record(NumpyDecoder(read_weights(out)), tokens), margin=0.05)
    print(result)
    assert result.max_difference_where_codes_agree < 1e-4, result
    assert result.greedy_equal_above_margin, result
    assert 2 * result.untouched > result.positions, result
    return result, saved


@pytest.mark.parametrize("changes", [{}, {"quantise": False}, {"ste": "learnable"}], ids=["ternary", "float", "learnt"])
def test_the_exported_folder(tmp_path: Path, changes: dict[str, Any]) -> None:
    out, tokens = tmp_path / "model", [int(t) for t in np.random.default_rng(0).integers(1, 300, 60)]
    train(options(write_texts(tmp_path / "texts"), out, iters=40, seq_length=64, **changes), silent)
    result, saved = check(out, "BitNetForCausalLM", tokens, tmp_path / "golden.npz")
    assert bool(result.codes) == ("quantise" not in changes)
    assert bpe.load(out).encode("def f(x):\n    return x + 12  # é\n").ids == saved["ids"].tolist()


@pytest.mark.parametrize(
    ("family", "kind", "changes"),
    [
        ("llama", "LlamaForCausalLM", {}),
        ("llama", "LlamaForCausalLM", {"ste": "learnable", "attention_bias": True}),
        ("qwen3", "Qwen3ForCausalLM", {"ste": "learnable", "head_dim": 18}),
        ("bitnet", "BitNetForCausalLM", {"ste": "learnable"}),
        ("llama", "BitNetForCausalLM", {"sub_norms": True, "attention_bias": True, "rope_theta": 3000.0}),
    ],
)  # fmt: skip
def test_a_model_made_ternary(tmp_path: Path, family: str, kind: str, changes: dict[str, Any]) -> None:
    run = qat_options(tmp_path, "out", family, eval_data=(), learning_rate=1e-2, **changes)
    qat(run, silent)
    tokens = [int(t) for t in np.random.default_rng(0).integers(1, 400, 40)]
    result, _ = check(run.output, kind, tokens, tmp_path / "golden.npz")
    assert result.codes


def test_a_fused_adapter_as_floats(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    write_adapter(tmp_path / "ad", base, 0.2, dora=True)
    fuse_options = FuseOptions(
        model=str(base.path), adapter_path=tmp_path / "ad", save_path=tmp_path / "out", dequantize=True, load={}
    )
    fuse(fuse_options)
    tokens = [int(t) for t in np.random.default_rng(0).integers(1, 300, 60)]
    check(tmp_path / "out", "BitNetForCausalLM", tokens, tmp_path / "golden.npz")
