"""Adapters on disk, in mlx-lm's layout, and beside a model's weights.

ADAPTER_PATH/adapters.safetensors    "model.layers.3.self_attn.q_proj.lora_a" and its like, float32
ADAPTER_PATH/adapter_config.json     fine_tune_type, num_layers, lora_parameters (rank, scale, dropout, keys)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_mlx.backends.low_rank import LowRank
from bitnet_mlx.checkpoint.folder import ADAPTER, name_list
from bitnet_mlx.checkpoint.safetensors_file import SafetensorsFile
from bitnet_mlx.checkpoint.tensors import FLOATS, as_float32, finite
from bitnet_mlx.errors import ConfigError, FormatError
from bitnet_mlx.models.config import DecoderConfig
from bitnet_mlx.models.weights import DecoderWeights

WEIGHTS, CONFIG = "adapters.safetensors", ADAPTER
KINDS = ("lora", "dora")
_MOST_RANK = 1 << 16
_SHOWN = 4  # tensors that a message names
Shape = tuple[int, ...]


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
            raise ConfigError(
                f"[adapter] fine_tune_type is {self.fine_tune_type!r}; {', '.join(KINDS)} are allowed: packed weights stay "
                "as they are (bitnet-mlx qat trains all of a float model's)"
            )
        if not 1 <= self.rank <= _MOST_RANK or not 0 <= self.dropout < 1 or not np.isfinite(self.scale):
            raise ConfigError(
                f"[adapter] rank {self.rank}, dropout {self.dropout:g} and scale {self.scale:g}; the rank must be 1 to "
                f"{_MOST_RANK}, the dropout in 0 to 1, the scale a number"
            )

    def record(self) -> dict[str, Any]:
        """As adapter_config.json has it."""
        parameters = {k: v for k, v in asdict(self).items() if k not in ("fine_tune_type", "num_layers")}
        if self.keys is None:
            del parameters["keys"]
        return {
            "fine_tune_type": self.fine_tune_type, "num_layers": self.num_layers, "lora_parameters": parameters
        }  # fmt: skip

    def modules(self, model: DecoderConfig) -> Iterator[tuple[str, tuple[int, int]]]:
        """(full name, (N, K)) of the linears of a model that have an adapter.

        Raises ConfigError where a key names no linear of a layer.
        """
        shapes = model.linear_shapes()
        if unknown := sorted(set(self.keys or ()) - set(shapes)):
            raise ConfigError(
                f"[adapter] no linear {', '.join(unknown)} in a layer; there are {', '.join(sorted(shapes))}"
            )
        layers = range(model.num_hidden_layers)
        for layer in layers[-self.num_layers :] if self.num_layers > 0 else layers:
            for name, shape in shapes.items():
                if self.keys is None or name in self.keys:
                    yield f"model.layers.{layer}.{name}", shape

    def tensors(self, model: DecoderConfig) -> dict[str, Shape]:
        """Names and shapes of all arrays that the adapter has."""
        found: dict[str, Shape] = {}
        for module, (n, k) in self.modules(model):
            found[f"{module}.lora_a"], found[f"{module}.lora_b"] = (k, self.rank), (self.rank, n)
            if self.fine_tune_type == "dora":
                found[f"{module}.m"] = (n,)
        return found


def read_config(folder: Path) -> AdapterConfig:
    """adapter_config.json of this package or of mlx-lm. Raises ConfigError or FormatError."""
    path = folder / CONFIG
    try:
        raw = json.loads(path.read_text("utf-8"))
        if "peft_type" in raw:
            raise ConfigError(
                f"[adapter] {path} is PEFT's; an adapter in mlx-lm's layout is needed: {WEIGHTS}, {CONFIG}"
            )
        kind = raw.get("fine_tune_type", "lora")
        parameters: dict[str, Any] = (
            raw["lora_parameters"] if kind in KINDS else {"rank": 1, "scale": 1}
        )  # "full" has none
        keys = parameters.get("keys")
        return AdapterConfig(
            kind, int(raw["num_layers"]), int(parameters["rank"]), float(parameters["scale"]),
            float(parameters.get("dropout", 0.0)), None if keys is None else tuple(keys),
        )  # fmt: skip
    except FileNotFoundError:
        raise ConfigError(f"[adapter] no {CONFIG} in {folder}; give the folder that training wrote") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"[adapter] {path} is no adapter's configuration: {error!r}; write it anew") from error


def read_tensors(path: Path, expected: Mapping[str, Shape]) -> dict[str, np.ndarray]:
    """The adapter's arrays, float32, as many and of the shapes that are expected. Raises ConfigError or FormatError."""
    if not path.is_file():
        raise ConfigError(f"[adapter] no file {path}; give the folder that training wrote")
    try:
        file = SafetensorsFile(path)
    except FormatError as error:
        raise FormatError(f"[adapter] {path} is damaged: {error}; write it anew") from error
    wrong = []
    for name in sorted({*file.tensors, *expected}):
        here = file.tensors[name].shape if name in file.tensors else None
        if here is None:
            wrong.append(f"{name} is missing")
        elif name not in expected:
            wrong.append(f"{name} is not known")
        elif here != expected[name]:
            wrong.append(f"{name} is {list(here)} and not {list(expected[name])}")
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise FormatError(
            f"[adapter] {path} is of another model or another configuration: {'; '.join(wrong[:_SHOWN])}{more}. "
            "Give the model that it was trained on"
        )
    return {name: _floats(file, name) for name in expected}


def _floats(file: SafetensorsFile, name: str) -> np.ndarray:
    info, array = file.tensors[name], file.array(name)
    if info.dtype not in FLOATS or not finite(array, info.dtype):
        raise FormatError(
            f"[adapter] {file.path}: {name} is {info}; finite floats are needed ({name_list(list(FLOATS))})"
        )
    return as_float32(array, info.dtype)


def read_parts(folder: str | Path, model: DecoderConfig) -> dict[str, LowRank]:
    """The adapter of a folder by the full names of the model's linears; gains are yet to be computed.

    Raises ConfigError or FormatError where the adapter is of another model, is damaged, or is none.
    """
    folder = Path(folder)
    config = read_config(folder)
    tensors = read_tensors(folder / WEIGHTS, config.tensors(model))
    return {
        module: LowRank(
            tensors[f"{module}.lora_a"], tensors[f"{module}.lora_b"], config.scale, tensors.get(f"{module}.m")
        )
        for module, _ in config.modules(model)
    }


def with_adapter(weights: DecoderWeights, folder: str | Path) -> DecoderWeights:
    """The same weights with the adapter of a folder beside them; no array of theirs is changed or copied.

    Raises ConfigError or FormatError as read_parts.
    """
    linears = dict(weights.linears)
    for module, part in read_parts(folder, weights.config).items():
        linears[module] = replace(linears[module], adapter=part.for_weight(linears[module].weight))
    return replace(weights, linears=linears)
