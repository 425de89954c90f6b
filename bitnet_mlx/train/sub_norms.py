"""Norms before o_proj and down_proj that a float model does not have and a ternary one does better with (BitNet's sub-norms).

A new norm grows in with the blend of its layer: (1 - b) x + b norm(x) is nothing at 0, so that the student starts as the
float model, and the norm at 1. Its weight starts as one number, the mean root mean square of what passes there in the float
model: of all norms with one number it changes the layer's output least.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from bitnet_mlx.errors import ConfigError
from bitnet_mlx.models.decoder_mlx import MlxModel
from bitnet_mlx.models.weights import DecoderWeights
from bitnet_mlx.nn.norm import RMSNorm
from bitnet_mlx.train.blend import Blend, ends, mixed


class SubNorm(RMSNorm):
    """blend: see train/blend.py. tell: called with the mean root mean square, float32 [], of all that passes."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__(np.array(norm.weight), norm.eps)
        self.blend: Blend = 0.0
        self.tell: Callable[[mx.array], None] | None = None

    def __call__(self, x: mx.array) -> mx.array:
        if self.tell is not None:
            self.tell(mx.sqrt(mx.mean(mx.square(x.astype(mx.float32)), axis=-1)).mean())
        if ends(self.blend) == 0:
            return x
        y = super().__call__(x)
        return y if ends(self.blend) == 1 else mixed(x, y, mx.array(self.blend)).astype(x.dtype)


def with_sub_norms(weights: DecoderWeights) -> DecoderWeights:
    """The same model with sub-norms of ones. Raises ConfigError where it has them, or where none could be written."""
    if weights.config.sub_norms:
        raise ConfigError("[qat] the model has sub-norms already; leave out --sub-norms")
    biased = [name for name, linear in weights.linears.items() if ".mlp." in name and linear.bias is not None]
    if biased:
        raise ConfigError(
            f"[qat] {biased[0]} has a bias, and no family with sub-norms has one there; leave out --sub-norms"
        )
    config = replace(weights.config, sub_norms=True)
    new = {
        f"model.layers.{layer}.{name}": np.ones(size, np.float32)
        for layer in range(config.num_hidden_layers)
        for name, size in config.norm_sizes().items()
        if name.endswith("sub_norm")
    }
    return replace(weights, config=config, norms={**weights.norms, **new})


def insert(student: MlxModel) -> None:
    """Let the sub-norms of a model made of `with_sub_norms` grow in."""
    for layer in student.layers:
        layer.self_attn.attn_sub_norm = SubNorm(layer.self_attn.attn_sub_norm)
        layer.mlp.ffn_sub_norm = SubNorm(layer.mlp.ffn_sub_norm)


def settle(student: MlxModel, ids: mx.array) -> None:
    """Set the weights of all sub-norms from what the student, whose blend is 0, makes of ids int32 [B, L]."""
    norms = [module for _, module in student.named_modules() if isinstance(module, SubNorm)]
    seen: list[list[mx.array]] = [[] for _ in norms]
    for norm, values in zip(norms, seen, strict=True):
        norm.tell = values.append
    mx.eval(student.model(ids, None, None), seen)
    for norm, [value] in zip(norms, seen, strict=True):
        norm.tell, norm.weight = None, mx.full(norm.weight.shape, value)
    mx.eval([norm.weight for norm in norms])


def described(source: dict[str, Any], weights: DecoderWeights) -> dict[str, Any]:
    """config.json of a model with new sub-norms, from that of the model without.

    transformers' BitNet is the same graph for a llama; of a qwen3, whose heads have norms, it has none: such a model gets a
    model_type that this package alone knows, so that no other drops its norms in silence.
    """
    config = weights.config
    table = {key: value for key, value in source.items() if key != "architectures"}
    rope = {"rope_theta": config.rope.rope_theta}
    if source.get("rope_parameters"):
        rope |= {"rope_parameters": {"rope_theta": config.rope.rope_theta, **source["rope_parameters"]}}
    table |= {
        "hidden_act": config.hidden_act, "rms_norm_eps": config.rms_norm_eps, "head_dim": config.head_dim,
        "bos_token_id": config.bos_token_id, "eos_token_id": list(config.eos_token_ids) or None, **rope,
    }  # fmt: skip
    if config.qk_norms:
        return {**table, "model_type": "bitnet_qwen3"}
    return {**table, "model_type": "bitnet", "architectures": ["BitNetForCausalLM"]}
