"""Held-out loss of the training graph, many windows at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from bitnet_mlx.checkpoint.folder import read_config
from bitnet_mlx.checkpoint.read import read_weights
from bitnet_mlx.errors import ConfigError
from bitnet_mlx.formats import words2
from bitnet_mlx.models.hf_config import parse_config
from bitnet_mlx.quality.bits import windows
from bitnet_mlx.ternary import TernaryTensor
from bitnet_mlx.train.export import read_decoder_config, read_master
from bitnet_mlx.train.layers import FixedLinear
from bitnet_mlx.train.losses import token_losses
from bitnet_mlx.train.model import TrainDecoder
from bitnet_mlx.train.ste import STANDARD


def compiled(function: Callable[..., Any], inputs: Any = None) -> Callable[..., Any]:
    """mx.compile on a GPU. On the CPU MLX would call a C++ compiler, which may be missing and gains nothing.

    inputs: arrays that the function reads besides its arguments. Unnamed, they become constants, and scalars among them
    part of a kernel's text, which is then compiled for every model anew.
    """
    return mx.compile(function, inputs=inputs) if mx.default_device().type == mx.DeviceType.gpu else function


def total_nats(model: TrainDecoder, ids: np.ndarray, length: int, stride: int, batch: int = 16) -> float:
    """Cross entropy of ids [tokens] in nats, over windows as quality/bits.py lays them."""
    losses = compiled(lambda rows: token_losses(model.head(), model.ready(rows[:, :-1]), rows[:, 1:]), model.state)
    chosen = list(windows(len(ids), length, stride))
    nats = 0.0
    for at in range(0, len(chosen), batch):
        part = chosen[at : at + batch]
        # A text shorter than one window has that one window alone, so all rows of a batch are of one length.
        rows = np.stack([ids[w.start : w.stop + 1] for w in part]).astype(np.int32)
        scored = np.array(losses(mx.array(rows))).astype(np.float64)
        nats += sum(float(row[w.skip :].sum()) for row, w in zip(scored, part, strict=True))
    return nats


def master_model(folder: Path, length: int, dtype: mx.Dtype = mx.float32) -> TrainDecoder:
    """A folder of float masters (train/export.py) in the training graph: ternary, or the float twin."""
    config, weights = read_master(folder, length)
    quantised = parse_config(read_config(folder)).quantization.storage == "online"
    model = TrainDecoder(config, STANDARD if quantised else None, dtype)
    model.update(tree_unflatten(list(weights.items())))
    return model


def packed_model(folder: Path) -> TrainDecoder:
    """A native folder of the bitnet family in the training graph, float32: what ships, number for number.

    Raises ConfigError for another family, or where a linear is not ternary with one scale.
    """
    config = read_decoder_config(folder)
    weights = read_weights(folder)
    model = TrainDecoder(config, dtype=mx.float32)
    model.model.embed_tokens.weight = mx.array(weights.embed_tokens.rows(slice(None)))
    for name, norm in weights.norms.items():
        _owner(model, f"{name}.weight")[0].weight = mx.array(norm)
    for name, linear in weights.linears.items():
        w = linear.weight
        if not isinstance(w, TernaryTensor) or w.scale.ndim or w.activation_bits != 8:
            raise ConfigError(f"[evaluate] {folder}: {name} is not ternary with one scale and int8 inputs")
        t = words2.unpack(w.words, w.shape[1]).astype(np.float32)
        owner, leaf = _owner(model, name)
        setattr(owner, leaf, FixedLinear(mx.array(t), mx.array(w.scale)))
    return model


def _owner(model: TrainDecoder, name: str) -> tuple[Any, str]:
    """The module that holds the last part of a dotted name, and that part."""
    *path, leaf = name.split(".")
    owner: Any = model
    for part in path:
        owner = owner[int(part)] if part.isdecimal() else getattr(owner, part)
    return owner, leaf
