"""GPTQ through a whole model, a layer at a time: each sees what the ternary layers before it make of the text.

Layers run by themselves (quality/one_layer.py), on MLX where it is there, else on numpy, so no more than one layer's floats
are widened at a time. While inputs are gathered int8 is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import numpy as np

from bitnet_mlx.calibration.gptq import checked, factor, gptq
from bitnet_mlx.calibration.least_squares import Fitted, spread, tensor
from bitnet_mlx.formats.dense import DenseRows
from bitnet_mlx.models.weights import DecoderWeights, Linear
from bitnet_mlx.quality.observed import is_linear
from bitnet_mlx.quality.one_layer import observing_backend, run_layer
from bitnet_mlx.ternary import matmul

Progress = Callable[[int, int], None]  # layers done, in all


def gptq_linears(
    weights: DecoderWeights,
    texts: Sequence[Sequence[int]],
    granularity: str,
    keep: Collection[str] = (),
    errors: dict[str, float] | None = None,
    progress: Progress | None = None,
) -> dict[str, Linear]:
    """The linears of a float model made ternary for these stretches of tokens, those in `keep` as they are.

    errors: takes each one's relative error, |W - W'| / |W|.
    """
    hidden = weights.embed_tokens.rows(np.concatenate([np.asarray(ids, np.int64) for ids in texts]))
    lengths, found = [len(ids) for ids in texts], {}
    backend = observing_backend()
    count, bits = weights.config.num_hidden_layers, weights.config.activation_bits
    for layer in range(count):
        prefix = f"model.layers.{layer}."
        linears = {name: weights.linears[prefix + name] for name in weights.config.linear_shapes()}
        made, dense = dict(linears), dict(linears)
        grams = Grams()
        run_layer(weights, layer, linears, hidden, lengths, backend, tap=grams.tap)
        for name, linear in linears.items():
            if prefix + name in keep:
                continue
            w = linear.weight.rows(slice(None))
            fitted = gptq(w, grams.of(name), granularity, grams.factor_of(name))
            made[name] = replace(linear, weight=tensor(fitted, bits))
            dense[name] = replace(linear, weight=DenseRows(whole(fitted), "float32"))
            if errors is not None:
                errors[prefix + name] = relative_error(w, fitted)
        found |= {prefix + name: linear for name, linear in made.items()}
        hidden = run_layer(weights, layer, dense, hidden, lengths, backend)
        if progress is not None:
            progress(layer + 1, count)
    return found


class Grams:
    """X^T X of every input that a layer's linears read, float64 [K, K]."""

    def __init__(self) -> None:
        self._sums: dict[str, np.ndarray] = {}
        self._first: dict[str, str] = {}
        self._factors: dict[str, np.ndarray] = {}
        self._last: tuple[np.ndarray | None, str] = (None, "")

    def tap(self, module: str, x: np.ndarray, y: np.ndarray) -> None:  # noqa: ARG002
        """See Hooks."""
        if not is_linear(module):
            return
        name = module.split(".", 3)[3]
        if x is not self._last[0]:
            self._last = x, name
            wide = x.astype(np.float64)
            gram = matmul(wide.T, wide)
            self._sums[name] = gram if name not in self._sums else self._sums[name] + gram
        self._first[name] = self._last[1]

    def of(self, name: str) -> np.ndarray:
        """Of the linear of this name inside the layer."""
        return self._sums[self._first[name]]

    def factor_of(self, name: str) -> np.ndarray:
        """gptq.factor of it, made once for linears that share an input. Raises FormatError where it is not finite."""
        first = self._first[name]
        if first not in self._factors:
            self._factors[first] = factor(checked(self._sums[first]))
        return self._factors[first]


def whole(fitted: Fitted) -> np.ndarray:
    """t * scale, float32 [N, K]."""
    t, scale = fitted
    return (t * spread(scale, t.shape)).astype(np.float32)


def relative_error(w: np.ndarray, fitted: Fitted) -> float:
    """|W - W'| / |W|; 0 for a weight of zeros."""
    power = float(np.square(w, dtype=np.float64).sum())
    return float(np.square(w - whole(fitted), dtype=np.float64).sum() / power) ** 0.5 if power else 0.0
