"""What a loader hands to a decoder: every tensor by its Hugging Face name, in the storage it keeps at run time."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field

import numpy as np

from bitnet_mlx.backends.low_rank import LowRank
from bitnet_mlx.formats.dense import DenseRows, GroupedRows
from bitnet_mlx.models.config import DecoderConfig
from bitnet_mlx.ternary import TernaryTensor

Matrix = TernaryTensor | DenseRows | GroupedRows


@dataclass(frozen=True)
class Linear:
    """weight [N, K] in any storage, and a float32 bias [N] where the checkpoint has one.

    norm: float32 [K], the weight of an RMSNorm that this linear applies to its input, after the norm that the layer has
    there; its eps is the config's linear_norm_eps.
    adapter: what runs beside the weight, with its gain computed, if there is one.
    """

    weight: Matrix
    bias: np.ndarray | None = None
    norm: np.ndarray | None = None
    adapter: LowRank | None = None


@dataclass
class DecoderWeights:
    """All weights of one decoder.

    linears: by full module name, "model.layers.0.self_attn.q_proj". norms: float32 vectors by full module name,
    "model.layers.0.input_layernorm", "model.norm". embed_tokens and lm_head: matrices [vocab, hidden]; with tied
    embeddings both are the same object.
    """

    config: DecoderConfig
    embed_tokens: Matrix
    lm_head: Matrix
    linears: MutableMapping[str, Linear] = field(default_factory=dict)
    norms: dict[str, np.ndarray] = field(default_factory=dict)

    def layer_linear(self, layer: int, name: str) -> Linear:
        """Linear `name` ("mlp.up_proj") of a layer."""
        return self.linears[f"model.layers.{layer}.{name}"]

    def layer_norm(self, layer: int, name: str) -> np.ndarray:
        """Weight of norm `name` ("input_layernorm") of a layer, float32."""
        return self.norms[f"model.layers.{layer}.{name}"]

    @property
    def described(self) -> str:
        """In a few words, for people."""
        return f"{self.config.model_type}, {self.config.num_hidden_layers} layers, {self.nbytes / 1e6:.1f} MB"

    @property
    def nbytes(self) -> int:
        """Bytes of all weights; a tied head is counted once."""
        total = self.embed_tokens.nbytes + sum(n.nbytes for n in self.norms.values())
        if self.lm_head is not self.embed_tokens:
            total += self.lm_head.nbytes
        for linear in self.linears.values():
            extras = (linear.bias, linear.norm, linear.adapter)
            total += linear.weight.nbytes + sum(v.nbytes for v in extras if v is not None)
        return total
