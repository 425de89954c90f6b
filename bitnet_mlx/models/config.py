"""DecoderConfig: what a decoder needs to know, the same for all families. Field names are config.json's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding. `rope_type` is default, linear, llama3 or yarn, as transformers names them."""

    rope_theta: float = 10000.0
    rope_type: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class DecoderConfig:
    """One decoder-only transformer: RMSNorm, grouped-query attention with RoPE, gated feed-forward."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 4096
    hidden_act: Literal["relu2", "silu"] = "silu"
    sub_norms: bool = False  # attn_sub_norm before o_proj, ffn_sub_norm before down_proj
    qk_norms: bool = False  # q_norm and k_norm, of head_dim, on each head of q and k before they are rotated (Qwen3)
    linear_norm_eps: float = 1e-6  # of the norm that a linear may have of its own (weights.Linear.norm)
    tie_word_embeddings: bool = False
    rope: RopeConfig = field(default_factory=RopeConfig)
    activation_bits: int = 8
    dtype: str = "bfloat16"  # the checkpoint's own
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    @property
    def groups(self) -> int:
        """Query heads that share one key-value head."""
        return self.num_attention_heads // self.num_key_value_heads

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(N, K) of each linear of a layer, by its name inside the layer."""
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        h, f = self.hidden_size, self.intermediate_size
        return {
            "self_attn.q_proj": (q, h),
            "self_attn.k_proj": (kv, h),
            "self_attn.v_proj": (kv, h),
            "self_attn.o_proj": (h, q),
            "mlp.gate_proj": (f, h),
            "mlp.up_proj": (f, h),
            "mlp.down_proj": (h, f),
        }

    def norm_sizes(self) -> dict[str, int]:
        """Width of each norm of a layer, by its name inside the layer."""
        sizes = {"input_layernorm": self.hidden_size, "post_attention_layernorm": self.hidden_size}
        if self.sub_norms:
            sizes["self_attn.attn_sub_norm"] = self.num_attention_heads * self.head_dim
            sizes["mlp.ffn_sub_norm"] = self.intermediate_size
        if self.qk_norms:
            sizes["self_attn.q_norm"] = sizes["self_attn.k_norm"] = self.head_dim
        return sizes


def inverse_frequencies(config: DecoderConfig) -> tuple[np.ndarray, float]:
    """RoPE's inverse frequencies, float32 [head_dim / 2], and the factor on cos and sin (1 but for YaRN).

    Angles are position * inverse frequency, the product rounded to float32, as transformers computes them.
    """
    from bitnet_mlx.models.rope import scaled_frequencies

    return scaled_frequencies(config.rope, config.head_dim, config.max_position_embeddings)
