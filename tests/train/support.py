"""A run small enough for a test: two layers, 64 wide, on made-up Python files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bitnet_mlx.train.options import TrainOptions

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


def silent(entry: dict[str, Any]) -> None:
    """A report that nobody reads."""
