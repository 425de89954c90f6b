"""A model's linears with an adapter fused into them, and what of the adapter each keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from bitnet_mlx.backends.low_rank import LowRank, Rows, blocks
from bitnet_mlx.calibration.layerwise import gptq_linears
from bitnet_mlx.calibration.least_squares import Fitted, fit, tensor
from bitnet_mlx.checkpoint.read import OnDemand
from bitnet_mlx.formats.dense import DenseRows
from bitnet_mlx.models.weights import DecoderWeights, Linear
from bitnet_mlx.ternary import SCALES, TernaryTensor, ternarize

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Loss:
    """Squares of Euclidean norms: of the base's weight W; of what the adapter adds; of fused - (W + adapter); and of the
    same where W + adapter is ternarised by absmean, as BitNet's masters are (None for a linear that is not ternary)."""

    base: float
    delta: float
    error: float
    absmean: float | None

    @property
    def lost(self) -> float:
        """The error as a share of what the adapter adds: 1 is what dropping the adapter would cost."""
        return _ratio(self.error, self.delta)

    def record(self) -> dict[str, float | None]:
        """delta: |adapter| / |W|. relative_error: |error| / |W|. lost, and absmean_lost: shares of what the adapter adds."""
        absmean = None if self.absmean is None else _ratio(self.absmean, self.delta)
        return {
            "delta": _ratio(self.delta, self.base), "relative_error": _ratio(self.error, self.base), "lost": self.lost,
            "absmean_lost": absmean,
        }  # fmt: skip


def total(losses: Mapping[str, Loss]) -> Loss:
    """Of all linears together, but for those that are not ternary."""
    parts = [loss for loss in losses.values() if loss.absmean is not None]
    sums = [sum(getattr(part, name) for part in parts) for name in ("base", "delta", "error", "absmean")]
    return Loss(*sums)


def fused_weights(
    weights: DecoderWeights,
    parts: Mapping[str, LowRank],
    method: str,
    scales: str | None,
    texts: Sequence[Sequence[int]],
    losses: dict[str, Loss],
    progress: Progress | None = None,
) -> DecoderWeights:
    """The weights with the adapter's parts fused into their linears, each made when it is asked for; but gptq, which goes
    through the model from layer to layer, makes them now.

    method: "float" leaves the sums floats, "absmean", "least-squares" and "gptq" make them ternary. scales: per tensor,
    row or group; None is each linear's own. texts: stretches of tokens that gptq fits to. losses: takes what each keeps.
    """
    made: Mapping[str, Linear] = {}
    if method == "gptq":
        floats = _each(weights, parts, lambda _name, _linear, whole: DenseRows(whole, "float32"))
        ternary = {m for m in parts if isinstance(weights.linears[m].weight, TernaryTensor)}
        first = weights.linears[min(ternary)].weight if ternary else None
        granularity = scales or (SCALES[first.scale.ndim] if isinstance(first, TernaryTensor) else "tensor")
        keep = [name for name in weights.linears if name not in ternary]
        made = gptq_linears(floats, texts, granularity, keep, progress=progress)

    def weight(name: str, linear: Linear, whole: np.ndarray) -> TernaryTensor | DenseRows:
        own = linear.weight
        if method == "float" or not isinstance(own, TernaryTensor):
            found: TernaryTensor | DenseRows = DenseRows(whole, "float32")
        elif name in made:
            found = made[name].weight  # type: ignore[assignment]
        elif method == "absmean":
            found = tensor(_absmean(whole), own.activation_bits)
        else:
            found = tensor(fit(whole, scales or SCALES[own.scale.ndim]), own.activation_bits)
        losses[name] = _loss(own, whole, found)
        return found

    return _each(weights, parts, weight)


def _each(weights: DecoderWeights, parts: Mapping[str, LowRank], make: Callable[..., object]) -> DecoderWeights:
    """Linears with an adapter get the weight that make(name, linear, W + adapter) gives, when they are asked for."""
    found = OnDemand()

    def one(name: str) -> Linear:
        linear = weights.linears[name]
        if name not in parts:
            return linear
        part = parts[name].for_weight(linear.weight)
        return replace(linear, weight=make(name, linear, part.fused(linear.weight, slice(None))))

    found.data.update({name: partial(one, name) for name in weights.linears})
    return replace(weights, linears=found)


def _absmean(whole: np.ndarray) -> Fitted:
    t, m = ternarize(whole)
    return t, np.asarray(m)


def _loss(base: Rows, whole: np.ndarray, made: TernaryTensor | DenseRows) -> Loss:
    again = None
    if isinstance(base, TernaryTensor):
        again = tensor(_absmean(whole))
    sums = np.zeros(4)
    for rows in blocks(base):
        w, sum_ = base.rows(rows).astype(np.float64), whole[rows].astype(np.float64)
        others = (0.0, w, made.rows(rows), 0.0 if again is None else again.rows(rows))
        sums += [np.square(a - b).sum() for a, b in zip((w, sum_, sum_, sum_), others, strict=True)]
    return Loss(sums[0], sums[1], sums[2], None if again is None else sums[3])


def _ratio(a: float, b: float) -> float:
    """sqrt(a / b); 0 where both are 0."""
    return math.sqrt(a / b) if b else 0.0 if not a else math.inf
