"""The decoder on MLX: an mlx.nn.Module by Hugging Face's names, which mlx-lm's generate and server accept as it is.

The graph is that of decoder_numpy.py. Norms, quantisers, products and activation functions compute in float32; what
passes between layers has the model's dtype. q, k and v share one norm and one quantisation, gate and up another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from bitnet_mlx.backends.mlx_affine import StockOps, gated
from bitnet_mlx.backends.mlx_import import mx, nn
from bitnet_mlx.errors import ConfigError
from bitnet_mlx.models.cache_mlx import KVCache, SequenceCache
from bitnet_mlx.models.config import DecoderConfig
from bitnet_mlx.models.rope_mlx import Rotary
from bitnet_mlx.models.weights import DecoderWeights
from bitnet_mlx.nn.bitlinear import BitLinear
from bitnet_mlx.nn.dense import DenseLinear, head_layer, linear_layer
from bitnet_mlx.nn.norm import RMSNorm

_PREFILL = 512  # tokens of one pass, so that memory does not grow with the prompt
_DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


class _Parts:
    """What the modules of one model are built from: its weights, by Hugging Face name, and its operations."""

    def __init__(self, weights: DecoderWeights, ops: StockOps) -> None:
        self.weights, self.config, self.ops = weights, weights.config, ops
        self.rotary = Rotary(weights.config)

    def linear(self, layer: int, name: str) -> nn.Module:
        linear = self.weights.layer_linear(layer, name)
        return linear_layer(linear.weight, linear.bias, self.ops)

    def norm(self, name: str) -> RMSNorm:
        return RMSNorm(self.weights.norms[name], self.config.rms_norm_eps, self.ops)

    def layer_norm(self, layer: int, name: str) -> RMSNorm:
        return self.norm(f"model.layers.{layer}.{name}")


def project(x: mx.array, norm: RMSNorm | None, linears: Sequence[nn.Module], dtype: mx.Dtype) -> list[mx.array]:
    """Several linears on the same x [..., K], which is normed first where `norm` is given, and quantised once.

    x may be wider than the model's dtype; the outputs have `dtype`.
    """
    codes = plain = None
    outputs = []
    for linear in linears:
        if isinstance(linear, BitLinear) and linear.activation_bits == 8:
            if codes is None:
                codes = linear.ops.quantize(x) if norm is None else norm.quantize(x)
                codes = codes._replace(dtype=dtype)
            outputs.append(linear(codes))
        else:
            if plain is None:
                plain = (x if norm is None else norm(x)).astype(dtype)
            outputs.append(linear(plain))
    return outputs


class Attention(nn.Module):
    """Grouped-query attention with rotary embedding."""

    def __init__(self, parts: _Parts, layer: int) -> None:
        super().__init__()
        config = parts.config
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.q_proj = parts.linear(layer, "self_attn.q_proj")
        self.k_proj = parts.linear(layer, "self_attn.k_proj")
        self.v_proj = parts.linear(layer, "self_attn.v_proj")
        self.o_proj = parts.linear(layer, "self_attn.o_proj")
        if config.sub_norms:
            self.attn_sub_norm = parts.layer_norm(layer, "self_attn.attn_sub_norm")
        self.rope = parts.rotary

    def __call__(self, x: mx.array, norm: RMSNorm, mask: mx.array | str | None, cache: Any) -> mx.array:
        """x: [B, L, H] before `norm`. Returns [B, L, H], to be added to x."""
        b, length, _ = x.shape
        q, k, v = project(x, norm, (self.q_proj, self.k_proj, self.v_proj), x.dtype)
        q = q.reshape(b, length, self.heads, self.head_dim).transpose(0, 2, 1, 3)
        k = k.reshape(b, length, self.kv_heads, self.head_dim).transpose(0, 2, 1, 3)
        v = v.reshape(b, length, self.kv_heads, self.head_dim).transpose(0, 2, 1, 3)
        offset = 0 if cache is None else cache.offset
        q, k = self.rope(q, offset), self.rope(k, offset)
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        out = _attend(q, k, v, cache, self.head_dim**-0.5, mask)
        out = out.transpose(0, 2, 1, 3).reshape(b, length, -1)
        sub_norm = self.attn_sub_norm if "attn_sub_norm" in self else None
        return project(out, sub_norm, (self.o_proj,), x.dtype)[0]


class FeedForward(nn.Module):
    """down(norm(act(gate(x)) * up(x)))."""

    def __init__(self, parts: _Parts, layer: int) -> None:
        super().__init__()
        self.hidden_act = parts.config.hidden_act
        self.gate_proj = parts.linear(layer, "mlp.gate_proj")
        self.up_proj = parts.linear(layer, "mlp.up_proj")
        self.down_proj = parts.linear(layer, "mlp.down_proj")
        if parts.config.sub_norms:
            self.ffn_sub_norm = parts.layer_norm(layer, "mlp.ffn_sub_norm")

    def __call__(self, x: mx.array, norm: RMSNorm) -> mx.array:
        """x: [B, L, H] before `norm`. Returns [B, L, H], to be added to x."""
        gate, up = project(x, norm, (self.gate_proj, self.up_proj), x.dtype)
        hidden = gated(mx.concatenate([gate, up], axis=-1), self.hidden_act)
        sub_norm = self.ffn_sub_norm if "ffn_sub_norm" in self else None
        return project(hidden, sub_norm, (self.down_proj,), x.dtype)[0]


class Block(nn.Module):
    """One layer of the decoder."""

    def __init__(self, parts: _Parts, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(parts, layer)
        self.mlp = FeedForward(parts, layer)
        self.input_layernorm = parts.layer_norm(layer, "input_layernorm")
        self.post_attention_layernorm = parts.layer_norm(layer, "post_attention_layernorm")

    def __call__(self, x: mx.array, mask: mx.array | str | None, cache: Any) -> mx.array:
        x = x + self.self_attn(x, self.input_layernorm, mask, cache)
        return x + self.mlp(x, self.post_attention_layernorm)


class Backbone(nn.Module):
    """Embedding and layers; the last norm belongs to it, as in Hugging Face's names."""

    def __init__(self, parts: _Parts, dtype: mx.Dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.embed_tokens = head_layer(parts.weights.embed_tokens, parts.ops)
        self.layers = [Block(parts, i) for i in range(parts.config.num_hidden_layers)]
        self.norm = parts.norm("model.norm")

    def __call__(self, inputs: mx.array, cache: Sequence[Any] | None, embeddings: mx.array | None) -> mx.array:
        """Token ids [B, L] -> [B, L, H] before the last norm."""
        x = (self.embed_tokens.rows(inputs) if embeddings is None else embeddings).astype(self.dtype)
        caches = [None] * len(self.layers) if cache is None else cache
        mask = _mask(x.shape[1], caches[0])
        for layer, entry in zip(self.layers, caches, strict=True):
            x = layer(x, mask, entry)
        return x


class MlxModel(nn.Module):
    """A decoder over DecoderWeights on MLX's default device; it offers models/decoder.py's protocol as well.

    Arrays are evaluated before a call returns, so threads may take turns; at one time one of them may run it.
    """

    def __init__(self, weights: DecoderWeights, dtype: str | None = None, ops: StockOps | None = None) -> None:
        super().__init__()
        self.config = weights.config
        self.ops = ops or StockOps()
        self.dtype = model_dtype(weights.config, dtype)
        self.model = Backbone(_Parts(weights, self.ops), _DTYPES[self.dtype])
        if weights.lm_head is not weights.embed_tokens:
            self.lm_head = head_layer(weights.lm_head, self.ops)
        self.freeze()

    @classmethod
    def from_weights(cls, weights: DecoderWeights, dtype: str | None = None, ops: StockOps | None = None) -> MlxModel:
        """dtype: of what passes between layers, "float32", "bfloat16" or "float16"; None lets model_dtype choose."""
        return cls(weights, dtype, ops)

    @property
    def name(self) -> str:
        """The backend's name."""
        return self.ops.name

    @property
    def layers(self) -> list[Block]:
        return self.model.layers

    @property
    def model_type(self) -> str:
        return self.config.model_type

    def __call__(
        self, inputs: mx.array, cache: Sequence[Any] | None = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        """Token ids [B, L] -> logits [B, L, vocab]. cache: one entry a layer, ours or mlx-lm's, updated in place."""
        return self.head(self.model(inputs, cache, input_embeddings))

    def head(self, x: mx.array) -> mx.array:
        """[..., H] before the last norm -> logits [..., vocab]."""
        head = self.lm_head if "lm_head" in self else self.model.embed_tokens
        # Codes are multiplied in float32 anyway; float rows of the model's own dtype are multiplied in it.
        return head(self.model.norm(x if isinstance(head, DenseLinear) else x.astype(mx.float32)))

    def make_cache(self, limit: int | None = None) -> SequenceCache:
        """An empty cache for at most `limit` positions, the model's context by default."""
        limit = self.config.max_position_embeddings if limit is None else limit
        return SequenceCache(KVCache(limit) for _ in self.layers)

    def step(
        self, tokens: Sequence[Sequence[int]], caches: Sequence[SequenceCache], logits: Literal["last", "all"] = "last"
    ) -> list[np.ndarray]:
        """See models/decoder.py. Long sequences run in pieces of 512 tokens; sequences run one after another."""
        return [self._sequence(ids, cache, logits) for ids, cache in zip(tokens, caches, strict=True)]

    def _sequence(self, ids: Sequence[int], cache: SequenceCache, logits: str) -> np.ndarray:
        if not len(ids):
            raise ConfigError("[step] a sequence has no tokens; each needs at least one")
        for entry in cache:
            entry.reserve(len(ids))
        pieces = []
        for at in range(0, len(ids), _PREFILL):
            piece = mx.array(np.asarray(ids[at : at + _PREFILL], np.int32))[None]
            x = self.model(piece, cache, None)
            if logits == "all":
                pieces.append(self.head(x)[0].astype(mx.float32))
            elif at + _PREFILL >= len(ids):
                pieces.append(self.head(x[:, -1])[0].astype(mx.float32))
            mx.eval(pieces, [entry.state for entry in cache])
        return np.concatenate([np.array(p) for p in pieces])


def model_dtype(config: DecoderConfig, asked: str | None = None) -> str:
    """The dtype of what passes between layers.

    By default float32 on MLX's CPU device and the checkpoint's own on a GPU. Squared ReLU passes 65504, the largest
    float16: such a model refuses float16 (ConfigError), and takes bfloat16 where its checkpoint is float16.
    """
    if asked is not None and asked not in _DTYPES:
        raise ConfigError(f"[dtype] {asked!r} was asked for; {', '.join(_DTYPES)} are allowed")
    if asked == "float16" and config.hidden_act == "relu2":
        raise ConfigError(
            f"[dtype] float16 was asked for and {config.model_type} uses squared ReLU, whose values pass 65504, "
            "the largest float16; choose bfloat16 or float32"
        )
    if asked is not None:
        return asked
    if mx.default_device() == mx.cpu or config.dtype not in _DTYPES:
        return "float32"
    return "bfloat16" if config.dtype == "float16" and config.hidden_act == "relu2" else config.dtype


def _mask(length: int, cache: Any) -> mx.array | str | None:
    if cache is not None and hasattr(cache, "make_mask"):
        return cache.make_mask(length, return_array=False, window_size=None)
    return None if length == 1 else "causal"


def _attend(q: mx.array, k: Any, v: Any, cache: Any, scale: float, mask: mx.array | str | None) -> mx.array:
    """q [B, heads, L, D] against keys and values [B, kv heads, T, D], or mlx-lm's quantised ones."""
    if hasattr(cache, "bits"):
        from bitnet_mlx import _mlxlm

        base = _mlxlm.module("models.base")
        return base.scaled_dot_product_attention(q, k, v, cache, scale=scale, mask=mask)
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
