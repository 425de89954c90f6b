"""What a profiler needs of an engine, and which engine's version it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from bitnet_mlx.backends import ON_MLX
from bitnet_mlx.models.decoder import Decoder
from bitnet_mlx.models.weights import DecoderWeights
from bitnet_mlx.profile.spans import Recorder


class Timed(Protocol):
    """A decoder with instruments. It shares the plain decoder's weights and takes its caches."""

    launch_kind: str  # what `launches` counts
    recorder: Recorder

    def step(self, ids: Sequence[int], cache: Any) -> np.ndarray:
        """float32 logits [vocab] after the last token; every stretch of the pass is marked on the recorder."""
        ...

    def launches(self) -> int:
        """How many there were in the last step, or are in the step of one token."""
        ...

    def traffic(self, tokens: int, positions: int) -> dict[str, int]:
        """Bytes of weights and cache that each part reads and writes, for so many tokens with so many positions held."""
        ...


def timed(decoder: Decoder) -> Timed:
    """The decoder with instruments. Raises BackendError where its engine cannot have them."""
    if decoder.name in ON_MLX:
        from bitnet_mlx.bench.profiled.timed_mlx import TimedMlx

        return TimedMlx(decoder)
    if decoder.name == "cpu":
        from bitnet_mlx.bench.profiled.timed_cpu import TimedCpu

        return TimedCpu(decoder)
    from bitnet_mlx.bench.profiled.timed_numpy import TimedNumpy

    return TimedNumpy(decoder)


def weight_traffic(weights: DecoderWeights, tokens: int) -> dict[str, int]:
    """Bytes of weights, scales and norms that a pass reads: each once, but for the embedding's rows."""
    layers = range(weights.config.num_hidden_layers)

    def of(*names: str) -> int:
        linears = [weights.layer_linear(layer, name) for layer in layers for name in names]
        return sum(sum(v.nbytes for v in (x.weight, x.bias, x.adapter) if v is not None) for x in linears)

    own = [linear.norm for linear in weights.linears.values() if linear.norm is not None]
    return {
        "embedding": tokens * weights.embed_tokens.nbytes // weights.embed_tokens.shape[0],
        "norm": sum(norm.nbytes for norm in (*weights.norms.values(), *own)),
        "qkv": of("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "o": of("self_attn.o_proj"),
        "gate_up": of("mlp.gate_proj", "mlp.up_proj"),
        "down": of("mlp.down_proj"),
        "head": weights.lm_head.nbytes,
    }


def cache_traffic(config: Any, tokens: int, positions: int, itemsize: int) -> int:
    """Bytes of keys and values that attention writes, and reads once a pass of one token or of many."""
    row = 2 * config.num_key_value_heads * config.head_dim * itemsize * config.num_hidden_layers
    return row * (positions + tokens)
