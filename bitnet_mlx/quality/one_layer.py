"""One layer of a model by itself, on given hidden states: a model of one layer whose embedding table they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from bitnet_mlx.api import make_decoder
from bitnet_mlx.backends import ON_MLX, missing
from bitnet_mlx.formats.dense import DenseRows
from bitnet_mlx.models.hooks import Tap
from bitnet_mlx.models.weights import DecoderWeights, Linear
from bitnet_mlx.quality.observed import is_linear, observable, tapped


def observing_backend() -> str:
    """Stock MLX where it is there, else numpy."""
    return "numpy" if missing("mlx") else "mlx"


def run_layer(
    weights: DecoderWeights,
    layer: int,
    linears: Mapping[str, Linear],
    hidden: np.ndarray,
    lengths: Sequence[int],
    backend: str,
    dtype: str | None = None,
    tap: Tap | None = None,
) -> np.ndarray:
    """One layer, with these linears (by their names inside it), on hidden states float32 [T, H] of stretches of text -> the
    same after it. backend: one that can be looked into; dtype: float32 unless it says otherwise."""
    config = replace(weights.config, num_hidden_layers=1, vocab_size=len(hidden), tie_word_embeddings=False)
    norms = {f"model.layers.0.{n}": weights.layer_norm(layer, n) for n in config.norm_sizes()}
    head = DenseRows(np.zeros((1, config.hidden_size), np.float32), "float32")
    own = {f"model.layers.0.{name}": linear for name, linear in linears.items()}
    single = DecoderWeights(
        config,
        DenseRows(np.ascontiguousarray(hidden), "float32"),
        head,
        own,
        norms | {"model.norm": weights.norms["model.norm"]},
    )
    decoder = observable(make_decoder(backend, single, (dtype or "float32") if backend in ON_MLX else None))
    out: list[np.ndarray] = []

    def told(module: str, x: np.ndarray, y: np.ndarray) -> None:
        if not is_linear(module):
            out.append(y)
        if tap is not None:
            tap(module, x, y)

    starts = np.cumsum([0, *lengths])
    with tapped(decoder, told):
        for start, length in zip(starts, lengths, strict=False):
            decoder.step([list(range(start, start + length))], [decoder.make_cache(limit=length)], "last")
    return np.concatenate(out)
