"""Decoders that can be looked into, and text run through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bitnet_mlx.api import embedded_model
from bitnet_mlx.checkpoint.adapter import with_adapter
from bitnet_mlx.checkpoint.hub import resolve
from bitnet_mlx.checkpoint.read import read_weights
from bitnet_mlx.models.decoder import Decoder
from bitnet_mlx.models.hooks import Hooks, Tap
from bitnet_mlx.models.weights import DecoderWeights
from bitnet_mlx.quality.bits import negative_log_likelihood

_AT_ONCE = 128  # tokens of one pass, so that logits stay small


class Observable(Decoder, Protocol):
    """A decoder with hooks: numpy's, and MLX's on any device."""

    @property
    def hooks(self) -> Hooks: ...

    def linear(self, module: str, x: np.ndarray) -> np.ndarray:
        """One linear alone: float32 [M, K], behind all norms -> float32 [M, N]."""
        ...


def observable(decoder: Decoder) -> Observable:
    """The decoder itself, or numpy's over the same weights in the place of cpu's, which computes the same bits."""
    if hasattr(decoder, "hooks"):
        return decoder  # type: ignore[return-value]
    from bitnet_mlx.models.decoder_numpy import NumpyDecoder

    return NumpyDecoder(decoder.weights)  # type: ignore[attr-defined]


@contextmanager
def tapped(decoder: Observable, tap: Tap | None) -> Iterator[None]:
    """Within, the decoder tells `tap` what its modules are given and give."""
    before, decoder.hooks.tap = decoder.hooks.tap, tap
    try:
        yield
    finally:
        decoder.hooks.tap = before


def weights_of(model: str | None, given: Mapping[str, Any]) -> DecoderWeights:
    """The weights that bitnet_mlx.load would run. given: its other keyword arguments; those about reading count."""
    names = ("head_bits", "activations", "i2s_layout", "ternarize")
    weights = read_weights(folder_of(model, given), **{name: given[name] for name in names if name in given})
    return with_adapter(weights, given["adapter_path"]) if given.get("adapter_path") else weights


def folder_of(model: str | None, given: Mapping[str, Any]) -> Path:
    """Where a model lies; None is the embedded one. A name on the hub is fetched."""
    return embedded_model() if model is None else resolve(model, given.get("revision"))


def is_linear(module: str) -> bool:
    """Whether a tap's module is a linear, not a whole layer."""
    return module.count(".") > 2


def samples(ids: Sequence[int], count: int, length: int) -> list[list[int]]:
    """At most `count` stretches of at most `length` tokens, evenly spread over a text; none overlaps another."""
    stretches = max(1, len(ids) // length)
    picked = np.unique(np.linspace(0, stretches - 1, min(count, stretches)).round().astype(int))
    return [list(ids[i * length : (i + 1) * length]) for i in picked]


def run(
    decoder: Decoder, texts: Sequence[Sequence[int]], progress: Callable[[int, int], None] | None = None
) -> tuple[float, int]:
    """Each stretch of tokens from an empty cache: cross entropy of all targets in nats, and how many there are."""
    nats, targets, done, total = 0.0, 0, 0, sum(map(len, texts))
    for ids in texts:
        cache = decoder.make_cache(limit=len(ids))
        for at in range(0, len(ids), _AT_ONCE):
            part = list(ids[at : at + _AT_ONCE])
            [logits] = decoder.step([part], [cache], logits="all")
            wanted = np.asarray(ids[at + 1 : at + 1 + len(part)], np.int64)
            nats += float(negative_log_likelihood(logits[: len(wanted)], wanted).sum()) if len(wanted) else 0.0
            targets, done = targets + len(wanted), done + len(part)
            if progress is not None:
                progress(done, total)
    return nats, targets
