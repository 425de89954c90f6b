"""Adapters on disk, in mlx-lm's layout, and on a model.

ADAPTER_PATH/adapters.safetensors    "model.layers.3.self_attn.q_proj.lora_a" and its like, float32
ADAPTER_PATH/adapter_config.json     fine_tune_type, num_layers, lora_parameters (rank, scale, dropout, keys)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from bitnet_mlx.errors import ConfigError, FormatError
from bitnet_mlx.nn.bitlinear import BitLinear
from bitnet_mlx.nn.dense import DenseLinear, GroupedLinear
from bitnet_mlx.nn.lora import DoRALinear, LoRALinear

KINDS = {"lora": LoRALinear, "dora": DoRALinear}
WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
_LINEARS = (BitLinear, DenseLinear, GroupedLinear)
_LEAVES = ("lora_a", "lora_b", "m")


@dataclass(frozen=True)
class AdapterConfig:
    """num_layers: how many of the last layers have adapters; 0 or less means all. keys: the linears of a layer
    ("self_attn.q_proj") that have one; None means all of them."""

    fine_tune_type: str = "lora"
    num_layers: int = -1
    rank: int = 8
    scale: float = 20.0
    dropout: float = 0.0
    keys: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.fine_tune_type not in KINDS:
            raise ConfigError(f"[adapter] fine_tune_type is {self.fine_tune_type!r}; {', '.join(KINDS)} are allowed")
        if self.rank < 1 or not 0 <= self.dropout < 1:
            raise ConfigError(
                f"[adapter] rank {self.rank} and dropout {self.dropout:g}; the rank must be 1 or more, the dropout in 0 to 1"
            )

    def record(self) -> dict[str, Any]:
        """As adapter_config.json has it."""
        parameters = {k: v for k, v in asdict(self).items() if k not in ("fine_tune_type", "num_layers")}
        if self.keys is None:
            del parameters["keys"]
        return {
            "fine_tune_type": self.fine_tune_type, "num_layers": self.num_layers, "lora_parameters": parameters
        }  # fmt: skip


def attach(model: Any, config: AdapterConfig) -> dict[str, mx.array]:
    """Put a new adapter on the chosen linears of an MlxModel; returns their parameters by full name.

    Raises ConfigError where a key names no linear of a layer, or an adapter is there already.
    """
    layers = list(enumerate(model.layers))
    chosen = layers[-config.num_layers :] if config.num_layers > 0 else layers
    known = {name for _, layer in chosen for name, _ in _linears(layer)}
    unknown = sorted(set(config.keys or ()) - known)
    if unknown:
        raise ConfigError(f"[adapter] no linear {', '.join(unknown)} in a layer; there are {', '.join(sorted(known))}")
    for _, layer in chosen:
        for name, linear in list(_linears(layer)):
            if config.keys is None or name in config.keys:
                adapted = _adapted(linear, config)
                adapted.train(model.training)
                _put(layer, name, adapted)
    parameters = adapter_parameters(model)
    mx.eval(parameters)
    return parameters


def adapter_parameters(model: nn.Module) -> dict[str, mx.array]:
    """All adapters' arrays by full name."""
    flat: Any = tree_flatten(model.parameters())
    return {name: array for name, array in flat if name.rpartition(".")[2] in _LEAVES}


def _linears(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    modules = dict(layer.named_modules())
    if any(isinstance(module, LoRALinear) for module in modules.values()):
        raise ConfigError("[adapter] the model has an adapter already; load it anew to give it another")
    return ((name, module) for name, module in sorted(modules.items()) if isinstance(module, _LINEARS))


def _adapted(linear: nn.Module, config: AdapterConfig) -> LoRALinear:
    n, k = (linear.output_dims, linear.input_dims) if isinstance(linear, BitLinear) else _float_shape(linear)
    return KINDS[config.fine_tune_type](linear, n, k, config.rank, config.dropout, config.scale)


def _float_shape(linear: Any) -> tuple[int, int]:
    n = linear.weight.shape[0]
    return n, linear.input_dims if isinstance(linear, GroupedLinear) else linear.weight.shape[1]


def _put(layer: nn.Module, name: str, module: nn.Module) -> None:
    *path, leaf = name.split(".")
    owner: Any = layer
    for part in path:
        owner = getattr(owner, part)
    setattr(owner, leaf, module)


def read_config(folder: Path) -> AdapterConfig:
    """adapter_config.json of this package or of mlx-lm. Raises ConfigError or FormatError."""
    path = folder / CONFIG
    try:
        raw = json.loads(path.read_text("utf-8"))
        parameters = raw["lora_parameters"]
        keys = parameters.get("keys")
        return AdapterConfig(
            raw.get("fine_tune_type", "lora"), int(raw["num_layers"]), int(parameters["rank"]),
            float(parameters["scale"]), float(parameters.get("dropout", 0.0)), None if keys is None else tuple(keys),
        )  # fmt: skip
    except FileNotFoundError:
        raise ConfigError(f"[adapter] no {CONFIG} in {folder}; give the folder that training wrote") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"[adapter] {path} is no adapter's configuration: {error!r}; write it anew") from error


def read_tensors(path: Path, expected: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """The adapter's arrays, as many and of the shapes that the model's own are. Raises ConfigError or FormatError."""
    if not path.is_file():
        raise ConfigError(f"[adapter] no file {path}; give the folder that training wrote")
    try:
        found = mx.load(str(path))
    except RuntimeError as error:
        raise FormatError(f"[adapter] {path} is damaged: {error}; write it anew") from error
    assert isinstance(found, dict)
    for name in sorted({*found, *expected}):
        here = found[name].shape if name in found else None
        wanted = expected[name].shape if name in expected else None
        if here != wanted:
            raise FormatError(
                f"[adapter] {path} has {name} as {here or 'nothing'}; this model takes {wanted or 'nothing'}: "
                "the adapter is of another model or another configuration"
            )
    return found


def load_adapter(model: Any, folder: str | Path) -> AdapterConfig:
    """Attach the adapter of a folder to an MlxModel. The model's own arrays stay as they are."""
    folder = Path(folder)
    config = read_config(folder)
    tensors = read_tensors(folder / WEIGHTS, attach(model, config))
    model.update(tree_unflatten(list(tensors.items())))
    model.eval()
    mx.eval(tensors)
    return config


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
