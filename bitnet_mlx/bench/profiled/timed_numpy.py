"""The numpy decoder, cut where its own seams are: at each linear's input, its codes, and its output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bitnet_mlx.bench.profiled.engine import cache_traffic, weight_traffic
from bitnet_mlx.models.cache import KVCache
from bitnet_mlx.models.decoder_numpy import NumpyDecoder
from bitnet_mlx.models.weights import Linear
from bitnet_mlx.profile.spans import Recorder

_PART = {
    "self_attn.q_proj": "qkv", "self_attn.k_proj": "qkv", "self_attn.v_proj": "qkv", "self_attn.o_proj": "o",
    "mlp.gate_proj": "gate_up", "mlp.up_proj": "gate_up", "mlp.down_proj": "down",
}  # fmt: skip
# What lies between the linear before and this one.
_BEFORE = {"qkv": "norm", "o": "attention", "gate_up": "norm", "down": "gate_up"}


class TimedNumpy(NumpyDecoder):
    """Norms of float linears count to the linear, the last norm to the head: numpy computes each pair in one call."""

    launch_kind = "timed stretches"

    def __init__(self, decoder: Any) -> None:
        super().__init__(decoder.weights)
        self.recorder = Recorder()
        self._entered = False
        self.observe = self._observe

    def step(self, ids: Sequence[int], cache: KVCache) -> np.ndarray:  # type: ignore[override]
        """See Timed."""
        self._entered = False
        logits = self._sequence(ids, cache, "last")
        self.recorder.mark("head")
        return logits

    def launches(self) -> int:
        """See Timed."""
        return len(self.recorder.spans)

    def traffic(self, tokens: int, positions: int) -> dict[str, int]:
        """See Timed."""
        attention = cache_traffic(self.config, tokens, positions, 4)
        return weight_traffic(self.weights, tokens) | {"attention": attention}

    def _observe(self, name: str, _codes: np.ndarray) -> None:
        self.recorder.mark("norm", int(name.split(".")[2]))

    def _linears(self, layer: int, names: Sequence[str], x: np.ndarray, norm: np.ndarray | None) -> list[np.ndarray]:
        part = _PART[names[0]]
        self.recorder.mark(*((_BEFORE[part], layer) if self._entered else ("embedding", None)))
        self._entered = True
        outputs = super()._linears(layer, names, x, norm)
        self.recorder.mark(part, layer)
        return outputs

    def _normed_linear(self, module: str, linear: Linear, norm: np.ndarray, x: np.ndarray) -> np.ndarray:
        out = super()._normed_linear(module, linear, norm, x)
        _, _, layer, name = module.split(".", 3)
        self.recorder.mark(_PART[name], int(layer))
        return out

    def _feed_forward(self, layer: int, x: np.ndarray) -> np.ndarray:
        out = super()._feed_forward(layer, x)
        if layer + 1 == self.config.num_hidden_layers:
            self.recorder.mark("down", layer)
        return out
