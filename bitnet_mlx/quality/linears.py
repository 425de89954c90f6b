"""How far each linear's weights are from those of a reference, and how much of a text's loss each layer is to blame for.

MSE is the mean of (w - r)^2; SQNR is 10 log10(sum r^2 / sum (w - r)^2) in decibel; cosine that of the two matrices as
vectors; zeros the share of ternary weights that are 0.
"""

from __future__ import annotations

import math
from collections import UserDict
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from bitnet_mlx.backends.low_rank import FusedRows
from bitnet_mlx.errors import ConfigError
from bitnet_mlx.formats import words2
from bitnet_mlx.models.decoder import Decoder
from bitnet_mlx.models.weights import DecoderWeights, Linear, Matrix
from bitnet_mlx.quality.score import Score
from bitnet_mlx.ternary import TernaryTensor

_ROWS = 1024  # rows widened at a time
Figures = dict[str, float | None]


def compare_linears(weights: DecoderWeights, reference: DecoderWeights | None) -> Iterator[tuple[str, Figures]]:
    """(module name, {"zeros", "positive", "mse", "sqnr_db", "cosine"}) of every linear, in the model's order.

    A linear with an adapter counts as the sum of the two. zeros and positive, shares of the weights, are None for what is
    not ternary; the others without a reference, and sqnr_db where nothing differs. Raises ConfigError where the reference's
    linears have other shapes.
    """
    if reference is not None:
        check_alike(weights, reference)
    for name in _names(weights):
        linear = weights.linears[name]
        own = linear.weight if linear.adapter is None else FusedRows(linear.weight, linear.adapter)
        zeros, positive = _shares(own) if isinstance(own, TernaryTensor) else (None, None)
        figures: Figures = {"zeros": zeros, "positive": positive, "mse": None, "sqnr_db": None, "cosine": None}
        if reference is not None:
            figures.update(_difference(own, reference.linears[name].weight))
        yield name, figures


def check_alike(weights: DecoderWeights, reference: DecoderWeights) -> None:
    """Raises ConfigError unless both have the same layers with linears of the same shapes."""
    own, other = weights.config, reference.config
    if (own.num_hidden_layers, own.linear_shapes()) != (other.num_hidden_layers, other.linear_shapes()):
        raise ConfigError(
            f"[evaluate] the teacher has {other.num_hidden_layers} layers of width {other.hidden_size}, the model "
            f"{own.num_hidden_layers} of {own.hidden_size}; figures by layer need a teacher of the same shape: its float parent"
        )


def _names(weights: DecoderWeights) -> list[str]:
    layers, shapes = range(weights.config.num_hidden_layers), weights.config.linear_shapes()
    return [f"model.layers.{layer}.{name}" for layer in layers for name in shapes]


def _shares(tensor: TernaryTensor) -> tuple[float, float]:
    """Of weights that are 0, and that are positive."""
    n, k = tensor.shape
    zeros = positive = 0
    for at in range(0, n, _ROWS):
        t = words2.unpack(tensor.words[at : at + _ROWS], k)
        zeros, positive = zeros + int((t == 0).sum()), positive + int((t > 0).sum())
    return zeros / (n * k), positive / (n * k)


class Sums:
    """Figures of values against a reference's, summed in parts."""

    def __init__(self) -> None:
        self._count = 0
        self._error = self._power = self._own_power = self._dot = 0.0

    def add(self, own: np.ndarray, reference: np.ndarray) -> None:
        """Float arrays of one shape."""
        w, r = np.asarray(own, np.float64), np.asarray(reference, np.float64)
        self._count += w.size
        self._error += float(np.square(w - r).sum())
        self._power += float(np.square(r).sum())
        self._own_power += float(np.square(w).sum())
        self._dot += float((w * r).sum())

    def figures(self) -> Figures:
        """mse; sqnr_db, None where nothing differs; cosine, None where one side is 0."""
        power, own, error = self._power, self._own_power, self._error
        return {
            "mse": error / max(self._count, 1),
            "sqnr_db": 10 * math.log10(power / error) if error and power else None,
            "cosine": self._dot / math.sqrt(power * own) if power and own else None,
        }


def _difference(own: Matrix | FusedRows, reference: Matrix) -> Figures:
    sums, n = Sums(), own.shape[0]
    for at in range(0, n, _ROWS):
        part = slice(at, min(at + _ROWS, n))
        sums.add(own.rows(part), reference.rows(part))
    return sums.figures()


class _Replaced(UserDict[str, Linear]):
    """A model's linears, those of one layer taken from another model."""

    def __init__(self, base: DecoderWeights, other: DecoderWeights, layer: int) -> None:
        super().__init__()
        self._base, self._other, self._prefix = base.linears, other.linears, f"model.layers.{layer}."

    def __getitem__(self, name: str) -> Linear:
        return (self._other if name.startswith(self._prefix) else self._base)[name]

    def __contains__(self, name: object) -> bool:
        return name in self._base

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)


def sensitivity(
    weights: DecoderWeights,
    reference: DecoderWeights,
    make: Callable[[DecoderWeights], Decoder],
    measure: Callable[[Decoder], Score],
    base: Score,
) -> list[tuple[int, float]]:
    """(layer, what the loss falls by, in nats a token, when this layer alone has the reference's linears), worst first.

    base: the score of the model as it is. Each layer's model is made by `make` and measured in turn.
    """
    check_alike(weights, reference)
    found = []
    for layer in range(weights.config.num_hidden_layers):
        changed = measure(make(replace(weights, linears=_Replaced(weights, reference, layer))))
        found.append((layer, base.nats / base.tokens - changed.nats / changed.tokens))
    return sorted(found, key=lambda pair: -pair[1])
