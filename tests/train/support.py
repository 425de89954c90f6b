"""Runs small enough for a test: from nothing, two layers, 64 wide, on made-up Python files; and from float to ternary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bitnet_mlx.train.options import TrainOptions
from bitnet_mlx.train.qat_options import QatOptions
from tests.support import hf_folder, tiny_tokenizers

SMALL = dict(iters=6, batch_size=2, seq_length=16, learning_rate=1e-3, warmup=1, save_every=2, steps_per_report=1)
WORDS = "path name value index count result total state cache token".split()


def write_texts(folder: Path, files: int = 12, seed: int = 0) -> Path:
    """Files of simple functions; no two are equal."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(files):
        lines = []
        for _ in range(12):
            a, b, c = rng.choice(WORDS, 3, replace=False)
            lines += [f"def {a}_{b}({a}, {b}):", f"    {c} = {a} + {b}", f"    return {c}", ""]
        (folder / f"module_{i}.py").write_text("\n".join(lines), "utf-8")
    return folder


def options(data: Path, output: Path, **changes: Any) -> TrainOptions:
    base: dict[str, Any] = dict(
        data=(data,), output=output, iters=12, batch_size=2, seq_length=32, learning_rate=3e-3, warmup=3, vocab_size=320,
        hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2, dtype="float32", steps_per_report=1,
    )  # fmt: skip
    base.update(changes)
    return TrainOptions(**base)


def qat_options(place: Path, output: str, family: str = "llama", **changes: Any) -> QatOptions:
    """A run from PLACE/float, a float model that is made if it is not there, to PLACE/output, on one sentence.

    changes: of the options, and of a new model's config.json.
    """
    known = {name: changes.pop(name) for name in tuple(changes) if name in QatOptions.__dataclass_fields__}
    if not (place / "float").exists():
        hf_folder.write(place / "float", family, "dense", **{"vocab_size": 420, **changes})
        tiny_tokenizers.byte_level(place / "float")
        (place / "train.txt").write_text("hello world the quick brown fox jumps over a lazy dog\n" * 20)
        (place / "eval.txt").write_text("hello world the quick brown fox jumps over a lazy dog\n" * 2)
    data = dict(data=(place / "train.txt",), eval_data=(place / "eval.txt",), model=str(place / "float"))
    return QatOptions(output=place / output, **{**data, **SMALL, **known})


def silent(entry: dict[str, Any]) -> None:
    """A report that nobody reads."""
