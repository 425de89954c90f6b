"""What goes into and comes out of linears while a text runs: ranges, histograms and errors, summed as the text streams."""

from __future__ import annotations

import math
from collections import UserDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from bitnet_mlx.backends.numpy_ref import quantized_linear
from bitnet_mlx.calibration.histogram import Histogram
from bitnet_mlx.formats import words2
from bitnet_mlx.models.weights import DecoderWeights, Linear
from bitnet_mlx.quality.observed import is_linear
from bitnet_mlx.ternary import TernaryTensor, matmul, quantize_activations, ternarize

_ROWS = 512  # of a weight, widened to float32 at a time


@dataclass
class Ratio:
    """Sums of squares: of what a quantiser changes, and of what it is given."""

    error: float = 0.0
    power: float = 0.0

    def add(self, found: np.ndarray, wanted: np.ndarray) -> None:
        """Float arrays of one shape."""
        self.error += float(np.square(np.subtract(found, wanted, dtype=np.float64)).sum())
        self.power += float(np.square(wanted, dtype=np.float64).sum())

    @property
    def decibel(self) -> float | None:
        """10 log10(power / error); None where nothing differs or there is nothing."""
        return 10 * math.log10(self.power / self.error) if self.error and self.power else None


@dataclass
class Input:
    """An input of one linear, or of several that share it. peaks: of max|x| of each token. int8: of its codes, a token a scale."""

    linears: list[str] = field(default_factory=list)
    values: Histogram = field(default_factory=Histogram)
    peaks: Histogram = field(default_factory=Histogram)
    int8: Ratio = field(default_factory=Ratio)

    def add(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows float32 [M, K]; returns their codes and scales."""
        self.values.add(x)
        self.peaks.add(np.abs(x).max(axis=-1))
        q, s = quantize_activations(x)
        self.int8.add(q / s[:, None], x)
        return q, s


class Collector:
    """`tap` is what a decoder's hooks are given.

    inputs: by the name of the first linear that reads it. outputs: by linear, how far its outputs with int8 inputs and
    ternary weights (the model's own, or made of floats by absmean) are from those with its inputs and weights as they are.
    """

    def __init__(self, weights: DecoderWeights, twins: Mapping[str, Linear]) -> None:
        """twins: the same linears with ternary weights."""
        self.inputs: dict[str, Input] = {}
        self.outputs: dict[str, Ratio] = {}
        self._weights, self._twins = weights, twins
        self._last: np.ndarray | None = None
        self._first = ""
        self._codes: tuple[np.ndarray, np.ndarray] | None = None

    def tap(self, module: str, x: np.ndarray, y: np.ndarray) -> None:
        """See Hooks."""
        if not is_linear(module):
            return
        if x is not self._last:
            self._last, self._first = x, module
            self._codes = self.inputs.setdefault(module, Input()).add(x)
        assert self._codes is not None
        here = self.inputs[self._first]
        if module not in here.linears:
            here.linears.append(module)
        linear, twin = self._weights.linears[module], self._twins[module]
        assert isinstance(twin.weight, TernaryTensor)
        floats = not isinstance(linear.weight, TernaryTensor) or linear.weight.activation_bits == 16
        exact = y if floats else plain_product(x, linear)
        self.outputs.setdefault(module, Ratio()).add(quantized_linear(*self._codes, twin.weight, twin.bias), exact)


class Twins(UserDict[str, Linear]):
    """A model's linears, those of floats made ternary by absmean when they are first asked for: 2 bits each, so they stay."""

    def __init__(self, linears: Mapping[str, Linear]) -> None:
        super().__init__()
        self._linears = linears

    def __getitem__(self, name: str) -> Linear:
        linear = self._linears[name]
        if isinstance(linear.weight, TernaryTensor):
            return linear
        if name not in self.data:
            t, m = ternarize(linear.weight.rows(slice(None)))
            tensor = TernaryTensor(words2.pack(t), np.asarray(m, np.float32), linear.weight.shape)
            self.data[name] = replace(linear, weight=tensor)
        return self.data[name]

    def __contains__(self, name: object) -> bool:
        return name in self._linears

    def __iter__(self) -> Iterator[str]:
        return iter(self._linears)

    def __len__(self) -> int:
        return len(self._linears)


def plain_product(x: np.ndarray, linear: Linear) -> np.ndarray:
    """float32 x [M, K] times the weight as floats, without a quantiser -> float32 [M, N]."""
    n = linear.weight.shape[0]
    parts = [matmul(x, linear.weight.rows(slice(at, min(at + _ROWS, n))).T) for at in range(0, n, _ROWS)]
    y = np.concatenate(parts, axis=1)
    return y if linear.bias is None else y + linear.bias
