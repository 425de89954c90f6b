"""The trained graph: transformers' BitNetForCausalLM (sub-norms, squared ReLU, RoPE), attributes named as its tensors.

x += o_proj(attn_sub_norm(attention(norm(x)))); x += down_proj(ffn_sub_norm(relu(gate)^2 * up)); logits = head(norm(x)).
Every linear's input is quantised to int8 and every linear's weight to -1, 0, 1; the float twin skips both.
"""

from __future__ import annotations

from functools import partial

import mlx.core as mx
import mlx.nn as nn

from bitnet_mlx.models.config import DecoderConfig, inverse_frequencies
from bitnet_mlx.train.layers import QATLinear, RMSNorm
from bitnet_mlx.train.optimizer import Tensors
from bitnet_mlx.train.pieces import Head
from bitnet_mlx.train.ste import STANDARD, STE, absmean, quantize_input

INIT_STD = 0.02


def gated(gate: mx.array, up: mx.array) -> mx.array:
    """max(gate, 0)^2 * up, of one shape and dtype."""
    positive = mx.maximum(gate, 0)
    return positive * positive * up


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and a norm before o_proj."""

    def __init__(self, config: DecoderConfig, ste: STE | None) -> None:
        super().__init__()
        shapes = config.linear_shapes()
        deep = INIT_STD / (2 * config.num_hidden_layers) ** 0.5
        self.q_proj = QATLinear(*shapes["self_attn.q_proj"], INIT_STD, ste)
        self.k_proj = QATLinear(*shapes["self_attn.k_proj"], INIT_STD, ste)
        self.v_proj = QATLinear(*shapes["self_attn.v_proj"], INIT_STD, ste)
        self.o_proj = QATLinear(*shapes["self_attn.o_proj"], deep, ste)
        self.attn_sub_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._config = config

    def __call__(self, x: mx.array, inverse: mx.array, quantise: bool) -> mx.array:
        c = self._config
        b, length, _ = x.shape
        x = quantize_input(x) if quantise else x

        def heads(y: mx.array, count: int) -> mx.array:
            return y.reshape(b, length, count, c.head_dim).swapaxes(1, 2)

        q = heads(self.q_proj(x), c.num_attention_heads)
        k = heads(self.k_proj(x), c.num_key_value_heads)
        v = heads(self.v_proj(x), c.num_key_value_heads)
        # freqs are periods here: MLX divides the position by them.
        rope = partial(mx.fast.rope, dims=c.head_dim, traditional=False, base=None, scale=1.0, offset=0, freqs=inverse)
        y = mx.fast.scaled_dot_product_attention(rope(q), rope(k), v, scale=c.head_dim**-0.5, mask="causal")
        y = self.attn_sub_norm(y.swapaxes(1, 2).reshape(b, length, -1))
        return self.o_proj(quantize_input(y) if quantise else y)


class MLP(nn.Module):
    """Gated feed-forward with squared ReLU and a norm before down_proj."""

    def __init__(self, config: DecoderConfig, ste: STE | None) -> None:
        super().__init__()
        shapes = config.linear_shapes()
        deep = INIT_STD / (2 * config.num_hidden_layers) ** 0.5
        self.gate_proj = QATLinear(*shapes["mlp.gate_proj"], INIT_STD, ste)
        self.up_proj = QATLinear(*shapes["mlp.up_proj"], INIT_STD, ste)
        self.down_proj = QATLinear(*shapes["mlp.down_proj"], deep, ste)
        self.ffn_sub_norm = RMSNorm(config.intermediate_size, config.rms_norm_eps)

    def __call__(self, x: mx.array, quantise: bool) -> mx.array:
        x = quantize_input(x) if quantise else x
        y = self.ffn_sub_norm(gated(self.gate_proj(x), self.up_proj(x)))
        return self.down_proj(quantize_input(y) if quantise else y)


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, config: DecoderConfig, ste: STE | None) -> None:
        super().__init__()
        self.self_attn = Attention(config, ste)
        self.mlp = MLP(config, ste)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(self, x: mx.array, inverse: mx.array, quantise: bool) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), inverse, quantise)
        return x + self.mlp(self.post_attention_layernorm(x), quantise)


class Body(nn.Module):
    """Embedding, layers and the last norm: what stands under "model." in a checkpoint."""

    def __init__(self, config: DecoderConfig, ste: STE | None) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_tokens.weight = mx.random.normal((config.vocab_size, config.hidden_size), scale=INIT_STD)
        self.layers = [Block(config, ste) for _ in range(config.num_hidden_layers)]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class TrainDecoder(nn.Module):
    """The whole decoder with tied embeddings: ids [B, L] -> logits [B, L, V] in `dtype`."""

    def __init__(self, config: DecoderConfig, ste: STE | None = STANDARD, dtype: mx.Dtype = mx.float32) -> None:
        """ste: None makes the float twin."""
        super().__init__()
        self.model = Body(config, ste)
        self._config, self._ste, self._dtype = config, ste, dtype
        self._periods = mx.array(1.0 / inverse_frequencies(config)[0])

    @property
    def config(self) -> DecoderConfig:
        return self._config

    @property
    def quantise(self) -> bool:
        """Whether weights and activations are quantised; False for the float twin."""
        return self._ste is not None

    def __call__(self, ids: mx.array) -> mx.array:
        return self.head().fixed(self._dtype)(self.ready(ids))

    def head(self) -> Head:
        """The embedding's rows once more, trained in both places."""
        return Head(lambda x, w: x @ w.T, self._config.vocab_size, (self.model.embed_tokens.weight,))

    def ready(self, ids: mx.array) -> mx.array:
        """ids [B, L] -> what the head multiplies, [B, L, H] in `dtype`."""
        # Rows are taken in float32, so that their gradients are summed in float32 too.
        x = self.model.embed_tokens.weight[ids].astype(self._dtype)
        for layer in self.model.layers:
            x = layer(x, self._periods, self.quantise)
        return self.model.norm(x)


def with_scales(masters: Tensors, ste: STE | None) -> Tensors:
    """Masters by name, and beside each linear's, where the scale is learnable, the logarithm of its mean."""
    if ste is None or not ste.learnable:
        return masters
    linears = [name.removesuffix(".weight") for name in masters if name.endswith("_proj.weight")]
    return {**masters, **{f"{name}.log_scale": mx.log(absmean(masters[f"{name}.weight"])) for name in linears}}
