"""A decoder in float64 by the textbook: nothing is quantised but the weights, and no order of sums is kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bitnet_mlx.formats.dense import DenseRows
from bitnet_mlx.models.config import inverse_frequencies
from bitnet_mlx.models.weights import DecoderWeights, Matrix
from bitnet_mlx.ternary import GROUP, TernaryTensor

_D = np.float64


def matrix(w: Matrix) -> np.ndarray:
    """float64 [N, K]; a ternary weight code by code from its words."""
    if not isinstance(w, TernaryTensor):
        assert isinstance(w, DenseRows)
        return w.rows(slice(None)).astype(_D)
    n, k = w.shape
    codes = (w.words[:, :, None] >> np.arange(0, 32, 2, dtype=np.uint32)) & np.uint32(3)
    t = codes.reshape(n, -1)[:, :k].astype(_D) - 1
    scale = w.scale.astype(_D)
    return t * (np.repeat(scale, GROUP, axis=1)[:, :k] if scale.ndim == 2 else scale.reshape(-1, 1))


def norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight.astype(_D)


def rotated(x: np.ndarray, angles: np.ndarray, factor: float) -> np.ndarray:
    """x [L, heads, D], angles [L, D / 2]: the pair (d, d + D / 2) as a complex number turned by its angle."""
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None] * factor
    return np.concatenate([turned.real, turned.imag], axis=-1)


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Causal: q [L, heads, D]; k, v [L, kv heads, D]."""
    out = np.empty_like(q)
    share = q.shape[1] // k.shape[1]
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // share].T / np.sqrt(q.shape[-1])
        scores[np.triu_indices(len(scores), 1)] = -np.inf
        e = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, head] = e / e.sum(axis=1, keepdims=True) @ v[:, head // share]
    return out


class Float64:
    """logits(tokens) of a model whose embedding and head are float or ternary."""

    def __init__(self, weights: DecoderWeights) -> None:
        self.weights, self.config = weights, weights.config

    def linear(self, layer: int, name: str, x: np.ndarray) -> np.ndarray:
        linear = self.weights.layer_linear(layer, name)
        if linear.norm is not None:
            x = norm(x, linear.norm, self.config.linear_norm_eps)
        y = x @ matrix(linear.weight).T
        return y if linear.bias is None else y + linear.bias

    def norm(self, layer: int, name: str, x: np.ndarray) -> np.ndarray:
        """The norm where the model has it."""
        if name not in self.config.norm_sizes():
            return x
        return norm(x, self.weights.layer_norm(layer, name), self.config.rms_norm_eps)

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """float64 [L, vocab]."""
        c, w = self.config, self.weights
        frequencies, factor = inverse_frequencies(c)
        angles = np.arange(len(tokens))[:, None] * frequencies.astype(_D)
        x = matrix(w.embed_tokens)[list(tokens)]
        for layer in range(c.num_hidden_layers):
            h = self.norm(layer, "input_layernorm", x)
            q, k, v = (self.linear(layer, f"self_attn.{n}_proj", h).reshape(len(tokens), -1, c.head_dim) for n in "qkv")
            q, k = (self.norm(layer, f"self_attn.{n}_norm", part) for n, part in (("q", q), ("k", k)))
            out = attention(rotated(q, angles, factor), rotated(k, angles, factor), v).reshape(len(tokens), -1)
            x = x + self.linear(layer, "self_attn.o_proj", self.norm(layer, "self_attn.attn_sub_norm", out))
            h = self.norm(layer, "post_attention_layernorm", x)
            gate, up = self.linear(layer, "mlp.gate_proj", h), self.linear(layer, "mlp.up_proj", h)
            act = np.maximum(gate, 0) ** 2 if c.hidden_act == "relu2" else gate / (1 + np.exp(-gate))
            x = x + self.linear(layer, "mlp.down_proj", self.norm(layer, "mlp.ffn_sub_norm", act * up))
        return norm(x, w.norms["model.norm"], c.rms_norm_eps) @ matrix(w.lm_head).T
