"""LoRA on the model that comes with the package: new text is learnt, what is written changes, the base's files do not."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from bitnet_mlx import generate, load
from bitnet_mlx.api import embedded_model
from bitnet_mlx.train.lora import lora
from bitnet_mlx.train.lora_options import LoraOptions
from tests.train.support import silent

TEXT = "The cat sat on the mat."


def hashes() -> dict[str, str]:
    files = [path for path in embedded_model().rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_lora_on_the_embedded_model(tmp_path: Path) -> None:
    before, adapter = hashes(), tmp_path / "adapter"
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    options = LoraOptions(
        data=tmp_path, adapter_path=adapter, train=True, iters=6, batch_size=1, num_layers=2, learning_rate=5e-3, seed=1
    )
    model, tokenizer = load(backend="mlx")
    record = lora(options, model, tokenizer, silent)  # type: ignore[arg-type]
    assert record["loss"] < record["first_loss"] - 1, record
    assert {"adapters.safetensors", "adapter_config.json"} <= {path.name for path in adapter.iterdir()}
    texts = []
    for path in (None, adapter):
        runs = [load(backend=engine, adapter_path=path) for engine in ("cpu", "numpy")]
        texts.append([generate(*run, "The cat", max_tokens=4) for run in runs])
    assert texts[0][0] == texts[0][1] != texts[1][0] == texts[1][1], texts
    assert "sat" in texts[1][0], texts
    assert hashes() == before
