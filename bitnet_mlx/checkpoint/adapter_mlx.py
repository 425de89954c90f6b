"""Adapters that are trained: put on an MLX model, and written (checkpoint/adapter.py has the files)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from bitnet_mlx.checkpoint.adapter import CONFIG, WEIGHTS, AdapterConfig, read_tensors
from bitnet_mlx.errors import ConfigError
from bitnet_mlx.nn.lora import DoRALinear, LoRALinear

_KINDS = {"lora": LoRALinear, "dora": DoRALinear}
_LEAVES = ("lora_a", "lora_b", "m")


def attach(model: Any, config: AdapterConfig) -> dict[str, mx.array]:
    """Put a new adapter on the chosen linears of an MlxModel; returns their parameters by full name.

    Raises ConfigError where a key names no linear of a layer, or an adapter is there already.
    """
    if adapter_parameters(model):
        raise ConfigError("[adapter] the model has an adapter already; load it anew to give it another")
    for module, (n, k) in config.modules(model.config):
        *path, leaf = module.split(".")
        owner: Any = model
        for part in path:
            owner = owner[int(part)] if part.isdecimal() else getattr(owner, part)
        kind = _KINDS[config.fine_tune_type]
        adapted = kind(getattr(owner, leaf), n, k, config.rank, config.dropout, config.scale)
        adapted.train(model.training)
        setattr(owner, leaf, adapted)
    parameters = adapter_parameters(model)
    mx.eval(parameters)
    return parameters


def adapter_parameters(model: nn.Module) -> dict[str, mx.array]:
    """All adapters' arrays by full name."""
    flat: Any = tree_flatten(model.parameters())
    return {name: array for name, array in flat if name.rpartition(".")[2] in _LEAVES}


def read_parameters(path: Path, expected: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """An adapter's arrays, as many and of the shapes of those given. Raises ConfigError or FormatError."""
    found = read_tensors(path, {name: tuple(array.shape) for name, array in expected.items()})
    return {name: mx.array(array) for name, array in found.items()}


def save_adapter(
    folder: Path, parameters: Mapping[str, mx.array], config: AdapterConfig, facts: dict[str, Any]
) -> None:
    """Write both files, each whole or not at all. facts: more entries of adapter_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / f".writing.{WEIGHTS}"
    mx.save_safetensors(str(scratch), dict(parameters))
    os.replace(scratch, folder / WEIGHTS)
    scratch = folder / f".writing.{CONFIG}"
    scratch.write_text(json.dumps({**facts, **config.record()}, indent=4, sort_keys=True) + "\n", "utf-8")
    os.replace(scratch, folder / CONFIG)
