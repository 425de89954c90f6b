"""Held-out loss of the training graph, many windows at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np

from bitnet_mlx.formats import words2
from bitnet_mlx.formats.dense import GroupedRows
from bitnet_mlx.quality.bits import windows
from bitnet_mlx.train.export import EMBEDDING, parameter_shapes, read_config
from bitnet_mlx.train.layers import FixedLinear
from bitnet_mlx.train.model import TrainDecoder


def total_nats(
    losses: Callable[[mx.array], mx.array], ids: np.ndarray, length: int, stride: int, batch: int = 32
) -> float:
    """Cross entropy of ids [tokens] in nats, over windows as quality/bits.py lays them.

    losses: ids [B, L + 1] -> float32 [B, L]. Only the only window of a short text is shorter than `length`.
    """
    chosen = list(windows(len(ids), length, stride))
    nats = 0.0
    for at in range(0, len(chosen), batch):
        part = chosen[at : at + batch]
        rows = np.stack([ids[w.start : w.stop + 1] for w in part]).astype(np.int32)
        scored = np.array(losses(mx.array(rows))).astype(np.float64)
        nats += sum(float(row[w.skip :].sum()) for row, w in zip(scored, part, strict=True))
    return nats


def packed_model(folder: Path) -> TrainDecoder:
    """A packed native folder (train/export.py) in the training graph, float32: what ships, number for number."""
    from safetensors.numpy import load_file

    config = read_config(folder)
    tensors = load_file(folder / "model.safetensors")
    model = TrainDecoder(config, dtype=mx.float32)
    rows = GroupedRows(tensors[EMBEDDING], tensors[f"{EMBEDDING}_scale"])
    model.model.embed_tokens.weight = mx.array(rows.rows(slice(None)))
    for name, shape in parameter_shapes(config).items():
        if name == EMBEDDING:
            continue
        *path, leaf = name.removesuffix(".weight").split(".")
        owner = model
        for part in path:
            owner = owner[int(part)] if part.isdecimal() else getattr(owner, part)
        if len(shape) == 1:
            getattr(owner, leaf).weight = mx.array(tensors[name])
        else:
            t = words2.unpack(tensors[name], shape[1]).astype(np.float32)
            setattr(owner, leaf, FixedLinear(mx.array(t), mx.array(tensors[f"{name}_scale"])))
    return model
