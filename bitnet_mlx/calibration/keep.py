"""Which layers to keep at higher precision."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from bitnet_mlx.errors import ConfigError

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
TIMES, SHARE = 2.0, 4  # how many times the median a kept layer costs, and one layer in how many may be kept
RULE = f"layers that cost more than {TIMES:g} times the median layer, the costliest first, at most one in {SHARE}"


def recommend(costs: Mapping[int, float]) -> list[int]:
    """The layers to keep, by RULE. costs: what each layer's quantisation costs, in any unit, more is worse."""
    limit = TIMES * max(float(np.median(list(costs.values()))), 0.0) if costs else 0.0
    worst = sorted((layer for layer, cost in costs.items() if cost > limit), key=lambda layer: -costs[layer])
    return sorted(worst[: max(1, len(costs) // SHARE)])


def noise_by_layer(outputs: Mapping[str, tuple[float, float]]) -> dict[int, float]:
    """The mean over a layer's linears of error / power. outputs: (error, power) by linear."""
    found: dict[int, list[float]] = {}
    for name, (error, power) in outputs.items():
        match = _LAYER.match(name)
        if match and power:
            found.setdefault(int(match[1]), []).append(error / power)
    return {layer: float(np.mean(ratios)) for layer, ratios in found.items()}


def linears_of(layers: Sequence[int], names: Sequence[str], count: int) -> tuple[str, ...]:
    """Full names of the linears `names` of these layers of a model that has `count`. Raises ConfigError for others."""
    wrong = [layer for layer in layers if not 0 <= layer < count]
    if wrong:
        raise ConfigError(f"[convert] --keep-layers names layer {wrong[0]}; the model has layers 0 to {count - 1}")
    return tuple(f"model.layers.{layer}.{name}" for layer in sorted(set(layers)) for name in names)
