"""The decoder in plain numpy: the specification that the other engines are compared with. Slow, and the same everywhere.

x += o_proj(attn_sub_norm(attention(norm(x)))); x += down_proj(ffn_sub_norm(act(gate) * up)); logits = head(norm(x)).
Sub-norms, norms of q's and k's heads, and norms inside linears only where the model has them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from bitnet_mlx.backends import numpy_ref as ref
from bitnet_mlx.models.cache import KVCache
from bitnet_mlx.models.config import inverse_frequencies
from bitnet_mlx.models.hooks import Hooks
from bitnet_mlx.models.rope import cos_sin
from bitnet_mlx.models.weights import DecoderWeights, Linear
from bitnet_mlx.ternary import TernaryTensor, quantize_activations


class NumpyDecoder:
    """A decoder over DecoderWeights; see models/decoder.py for the interface."""

    name = "numpy"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.weights.described})"

    def __init__(self, weights: DecoderWeights) -> None:
        self.weights = weights
        self.config = weights.config
        # Called with a linear's module name and its int8 input [M, K], once for linears that share the codes.
        self.observe: Callable[[str, np.ndarray], None] | None = None
        self.hooks = Hooks()
        self._inverse, self._rope_factor = inverse_frequencies(weights.config)

    def make_cache(self, limit: int | None = None) -> KVCache:
        return KVCache(self.config, limit=limit)

    def step(
        self, tokens: Sequence[Sequence[int]], caches: Sequence[KVCache], logits: Literal["last", "all"] = "last"
    ) -> list[np.ndarray]:
        return [self._sequence(ids, cache, logits) for ids, cache in zip(tokens, caches, strict=True)]

    def hidden(self, tokens: Sequence[Sequence[int]], caches: Sequence[KVCache]) -> list[np.ndarray]:
        return [self._states(ids, cache) for ids, cache in zip(tokens, caches, strict=True)]

    def _sequence(self, ids: Sequence[int], cache: KVCache, logits: str) -> np.ndarray:
        hidden = self._states(ids, cache, last=logits == "last")
        y = ref.dense_linear(hidden, self.weights.lm_head)
        return y[0] if logits == "last" else y

    def _states(self, ids: Sequence[int], cache: KVCache, last: bool = False) -> np.ndarray:
        """The normed rows [length, hidden] that the head is given, or the last one alone."""
        cache.reserve(len(ids))
        x = self.weights.embed_tokens.rows(np.asarray(ids, np.int64))
        rotation = cos_sin(self._inverse, self._rope_factor, cache.offset, len(ids))
        for layer in range(self.config.num_hidden_layers):
            before = x
            x = x + self._attention(layer, x, cache, rotation)
            x = x + self._feed_forward(layer, x)
            self._tell(f"model.layers.{layer}", before, x)
        cache.offset += len(ids)
        return ref.rms_norm(x[-1:] if last else x, self.weights.norms["model.norm"], self.config.rms_norm_eps)

    def _linears(self, layer: int, names: Sequence[str], x: np.ndarray, norm: np.ndarray | None) -> list[np.ndarray]:
        """Several linears on the same input, which is normed first where `norm` is given and quantised once."""
        eps = self.config.rms_norm_eps
        codes = None
        plain = x if norm is None else ref.rms_norm(x, norm, eps)
        outputs = []
        for name in names:
            module, linear = f"model.layers.{layer}.{name}", self.weights.layer_linear(layer, name)
            if linear.norm is not None:
                outputs.append(_whole(linear, self._normed_linear(module, linear, linear.norm, plain), plain))
                continue
            weight = _quantising(linear)
            if weight is None or module in self.hooks.clips:
                y = self.linear(module, plain)
            else:
                if codes is None:
                    codes = quantize_activations(x) if norm is None else ref.norm_quantize(x, norm, eps)
                    self._show(module, codes[0])
                y = ref.quantized_linear(*codes, weight, _early_bias(linear))
            self._tell(module, plain, y)
            outputs.append(_whole(linear, y, plain))
        return outputs

    def _normed_linear(self, module: str, linear: Linear, norm: np.ndarray, x: np.ndarray) -> np.ndarray:
        """A linear with a norm of its own, on the input that the layer's norm gave."""
        eps, weight = self.config.linear_norm_eps, _quantising(linear)
        plain = ref.rms_norm(x, norm, eps) if weight is None or self.hooks.used else x
        if weight is None or module in self.hooks.clips:
            y = self.linear(module, plain)
        else:
            codes = ref.norm_quantize(x, norm, eps)
            self._show(module, codes[0])
            y = ref.quantized_linear(*codes, weight, _early_bias(linear))
        self._tell(module, plain, y)
        return y

    def linear(self, module: str, x: np.ndarray) -> np.ndarray:
        """One linear alone, as a step computes it: float32 x [M, K], behind all norms -> [M, N]. Its clip counts.

        Where it has an adapter, this is what comes before the adapter's part and the bias."""
        linear = self.weights.linears[module]
        weight = _quantising(linear)
        if weight is None:
            return ref.dense_linear(x, linear.weight, _early_bias(linear))
        clip = np.float32(self.hooks.clips.get(module, np.inf))
        codes = quantize_activations(np.clip(x, -clip, clip))
        self._show(module, codes[0])
        return ref.quantized_linear(*codes, weight, _early_bias(linear))

    def _tell(self, module: str, x: np.ndarray, y: np.ndarray) -> None:
        if self.hooks.tap is not None:
            self.hooks.tap(module, x, y)

    def _show(self, module: str, q: np.ndarray) -> None:
        if self.observe is not None:
            self.observe(module, q)

    def _attention(
        self, layer: int, x: np.ndarray, cache: KVCache, rotation: tuple[np.ndarray, np.ndarray]
    ) -> np.ndarray:
        c, m, start = self.config, len(x), cache.offset
        names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        q, k, v = self._linears(layer, names, x, self.weights.layer_norm(layer, "input_layernorm"))
        q, k = (v.reshape(m, -1, c.head_dim) for v in (q, k))
        if c.qk_norms:
            q = ref.rms_norm(q, self.weights.layer_norm(layer, "self_attn.q_norm"), c.rms_norm_eps)
            k = ref.rms_norm(k, self.weights.layer_norm(layer, "self_attn.k_norm"), c.rms_norm_eps)
        q, k = ref.rope(q, *rotation), ref.rope(k, *rotation)
        keys, values = cache.keys[layer], cache.values[layer]
        keys[:, start : start + m] = k.transpose(1, 0, 2)
        values[:, start : start + m] = v.reshape(m, c.num_key_value_heads, c.head_dim).transpose(1, 0, 2)
        out = np.stack([ref.attend(q[i], keys[:, : start + i + 1], values[:, : start + i + 1]) for i in range(m)])
        norm = self.weights.layer_norm(layer, "self_attn.attn_sub_norm") if c.sub_norms else None
        return self._linears(layer, ["self_attn.o_proj"], out.reshape(m, -1), norm)[0]

    def _feed_forward(self, layer: int, x: np.ndarray) -> np.ndarray:
        norm = self.weights.layer_norm(layer, "post_attention_layernorm")
        gate, up = self._linears(layer, ["mlp.gate_proj", "mlp.up_proj"], x, norm)
        hidden = ref.gated(gate, up, self.config.hidden_act)
        norm = self.weights.layer_norm(layer, "mlp.ffn_sub_norm") if self.config.sub_norms else None
        return self._linears(layer, ["mlp.down_proj"], hidden, norm)[0]


def _quantising(linear: Linear) -> TernaryTensor | None:
    """The weight of a linear that quantises its input; None for others."""
    weight = linear.weight
    return weight if isinstance(weight, TernaryTensor) and weight.activation_bits == 8 else None


def _early_bias(linear: Linear) -> np.ndarray | None:
    """The bias that the product itself adds: an adapter's part comes first."""
    return linear.bias if linear.adapter is None else None


def _whole(linear: Linear, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """A linear's output, with its adapter's part for the input x, where it has one."""
    if linear.adapter is None:
        return y
    y = ref.adapted(y, x, linear.adapter)
    return y if linear.bias is None else y + linear.bias
