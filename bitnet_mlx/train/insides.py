"""What passes inside a decoder: hidden states behind layers, one layer's q, k and v, and what the head multiplies."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx

from bitnet_mlx.backends.mlx_affine import rope_kv
from bitnet_mlx.models.cache_mlx import halves
from bitnet_mlx.models.decoder_mlx import MlxModel
from bitnet_mlx.models.layers_mlx import enter
from bitnet_mlx.train.layerwise import Layer, through


class Insides(NamedTuple):
    """ready: what the head multiplies, [B, L, H]. hidden: the residual stream [B, L, H] behind each layer that was asked for.
    states: queries and keys, rotated, and values of a layer, [B, heads, L, D] each, or none."""

    ready: mx.array
    hidden: list[mx.array]
    states: list[mx.array]


class Looker:
    """Runs a model and keeps some of its insides. Made before the layers are called through anything else."""

    def __init__(self, model: MlxModel, hidden: Sequence[int], states: int | None) -> None:
        """hidden, states: layers, counted from 0."""
        self._model, self._hidden, self._states = model, tuple(hidden), states
        self._block = None if states is None else model.layers[states]

    def __call__(self, ids: mx.array) -> Insides:
        """ids: int32 [B, L]."""
        if not self._hidden and self._block is None:
            return Insides(self._ready(ids), [], [])
        inputs: dict[int, mx.array] = {}
        outputs: dict[int, mx.array] = {}

        def wrap(index: int, layer: Layer) -> Layer:
            def call(x: mx.array, *rest: Any) -> mx.array:
                inputs[index], outputs[index] = x, layer(x, *rest)
                return outputs[index]

            return call

        with through(self._model, wrap):
            ready = self._ready(ids)
        hidden = [outputs[index] for index in self._hidden]
        if self._block is None or self._states is None:
            return Insides(ready, hidden, [])
        # Made once more here, from the layer's input: what is computed inside a layer may not be kept (--grad-checkpoint).
        rotation = self._model.model._rotary.at(None, ids.shape[1])
        q, kv = enter(
            partial(rope_kv, training=True), self._block.plan, self._block.sites().qkv, inputs[self._states], rotation
        )
        return Insides(ready, hidden, [q, *halves(kv)])

    def _ready(self, ids: mx.array) -> mx.array:
        return self._model.ready(self._model.model(ids, None, None))
