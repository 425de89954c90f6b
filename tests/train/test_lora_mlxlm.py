"""Adapters between this package and the real mlx-lm, on a model that both run: each loads what the other has trained."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from bitnet_mlx import _mlxlm, load
from bitnet_mlx.train.lora import lora
from bitnet_mlx.train.lora_options import LoraOptions
from tests.support import hf_folder, tiny_tokenizers
from tests.train.support import silent

IDS = [5, 17, 200, 3, 88, 41, 9, 310]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float llama, and samples."""
    folder = tmp_path_factory.mktemp("mlxlm")
    hf_folder.write(folder / "base", "llama", "dense", vocab_size=420, dtype=mx.float32, tie_word_embeddings=False)
    tiny_tokenizers.byte_level(folder / "base")
    (folder / "data").mkdir()
    for name in ("train", "valid"):
        (folder / "data" / f"{name}.jsonl").write_text(json.dumps({"text": "hello world the quick brown fox"}) + "\n")
    return folder


def theirs(place: Path, adapter: Path | None) -> np.ndarray:
    path = None if adapter is None else str(adapter)
    model, _ = _mlxlm.module("utils").load(str(place / "base"), adapter_path=path)
    return np.array(model(mx.array([IDS]))[0].astype(mx.float32))


def ours(place: Path, adapter: Path | None, backend: str) -> np.ndarray:
    model, _ = load(place / "base", backend, adapter_path=adapter)
    return model.step([IDS], [model.make_cache()], "all")[0]


def agree(place: Path, adapter: Path) -> None:
    expected = theirs(place, adapter)
    assert np.abs(expected - theirs(place, None)).max() > 0.01 * expected.std()
    for backend in ("numpy", "cpu", "mlx"):
        np.testing.assert_allclose(ours(place, adapter, backend), expected, rtol=0, atol=1e-4 * expected.std())


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_what_mlx_lm_has_trained_runs_here(place: Path, kind: str) -> None:
    module, adapter = _mlxlm.module("lora"), place / f"theirs-{kind}"
    given: dict[str, Any] = {
        "model": str(place / "base"), "train": True, "data": str(place / "data"), "adapter_path": str(adapter), "iters": 2,
        "batch_size": 1, "num_layers": 1, "fine_tune_type": kind, "learning_rate": 1e-2, "val_batches": 1,
    }  # fmt: skip
    module.run(SimpleNamespace(**{**module.CONFIG_DEFAULTS, **given}))
    agree(place, adapter)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_what_was_trained_here_runs_in_mlx_lm(place: Path, kind: str) -> None:
    adapter = place / f"ours-{kind}"
    options = LoraOptions(
        data=place / "data", adapter_path=adapter, train=True, iters=2, batch_size=1, num_layers=1, fine_tune_type=kind,
        learning_rate=1e-2, rank=3, keys=("self_attn.q_proj", "mlp.down_proj"),
    )  # fmt: skip
    model, tokenizer = load(place / "base", "mlx")
    lora(options, model, tokenizer, silent)  # type: ignore[arg-type]
    agree(place, adapter)
