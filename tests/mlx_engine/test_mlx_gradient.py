"""Gradients through packed layers and through a whole model, against MLX's own of a float twin.

The twin multiplies with the widened weights, and quantises in straight-through form: x + stop_gradient(q / s - x).
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten, tree_map

from bitnet_mlx.models.config import inverse_frequencies
from bitnet_mlx.models.decoder_mlx import MlxModel
from bitnet_mlx.models.rope import cos_sin
from bitnet_mlx.models.weights import DecoderWeights
from bitnet_mlx.nn import gradient
from bitnet_mlx.nn.bitlinear import BitLinear
from bitnet_mlx.ternary import TernaryTensor
from tests.mlx_engine.test_mlx_decoder import build, ids
from tests.support.random_model import random_ternary

TRAINED = ["bitnet", "bitnet, two dense linears, 4-bit head", "llama, group scales, biases, 6-bit head", "yarn rope"]


def floats(seed: int, *shape: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def quantised(x: mx.array) -> mx.array:
    s = 127 / mx.maximum(mx.abs(x).max(axis=-1, keepdims=True), 1e-5)
    return x + mx.stop_gradient(mx.clip(mx.round(x * s), -128, 127) / s - x)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("scale", ["tensor", "row", "group"])
@pytest.mark.parametrize(("shape", "n", "k"), [((1,), 5, 10), ((2, 3), 33, 300), ((100,), 129, 128)])
def test_the_gradient_is_that_of_the_widened_layer(
    shape: tuple[int, ...], n: int, k: int, scale: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradient, "_ROWS", 50)  # several blocks of rows, the last one ragged
    w = random_ternary(np.random.default_rng(n), n, k, scale, bits)
    layer, bias = BitLinear(w, np.array(floats(0, n))), floats(0, n)
    wide, x = mx.array(w.rows(slice(None))), floats(1, *shape, k)

    def loss(y: mx.array) -> mx.array:
        return (mx.sin(y) * mx.arange(n)).sum()

    twin = quantised if bits == 8 else lambda x: x
    expected, dx = mx.value_and_grad(lambda x: loss(twin(x) @ wide.T + bias))(x)
    for run in (layer, mx.compile(layer), mx.checkpoint(layer.__call__)):
        found, gx = mx.value_and_grad(lambda x, run=run: loss(run(x)))(x)
        assert gx.shape == x.shape and np.allclose(found, expected, rtol=1e-4, atol=1e-2)
        np.testing.assert_allclose(np.array(gx), np.array(dx), rtol=0, atol=1e-3 * float(mx.abs(dx).max()))
    narrow = mx.grad(lambda x: loss(layer(x)))(x.astype(mx.bfloat16))
    assert narrow.dtype == mx.bfloat16 and mx.isfinite(narrow).all()


class Twin:
    """A decoder in plain float operations of MLX, from widened weights."""

    def __init__(self, weights: DecoderWeights) -> None:
        self.w, self.c = weights, weights.config

    def linear(self, name: str, x: mx.array) -> mx.array:
        linear = self.w.linears[name]
        x = quantised(x) if isinstance(linear.weight, TernaryTensor) else x
        y = x @ mx.array(linear.weight.rows(slice(None))).T
        return y if linear.bias is None else y + mx.array(linear.bias)

    def norm(self, norms: dict[str, mx.array], name: str, x: mx.array) -> mx.array:
        if name not in norms:
            return x
        return x * mx.rsqrt((x * x).mean(axis=-1, keepdims=True) + self.c.rms_norm_eps) * norms[name]

    def rope(self, x: mx.array) -> mx.array:
        cos, sin = (mx.array(t) for t in cos_sin(*inverse_frequencies(self.c), 0, x.shape[2]))
        a, b = mx.split(x, 2, axis=-1)
        return mx.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def layer(self, norms: dict[str, mx.array], at: str, x: mx.array) -> mx.array:
        c = self.c
        h = self.norm(norms, f"{at}.input_layernorm", x)
        q, k, v = (
            self.linear(f"{at}.self_attn.{n}_proj", h).reshape(1, x.shape[1], -1, c.head_dim).transpose(0, 2, 1, 3)
            for n in "qkv"
        )
        k, v = (mx.repeat(t, c.groups, axis=1) for t in (self.rope(k), v))
        scores = self.rope(q) @ k.transpose(0, 1, 3, 2) / c.head_dim**0.5
        mask = mx.triu(mx.full(scores.shape[-2:], -np.inf), k=1)
        out = (mx.softmax(scores + mask, axis=-1) @ v).transpose(0, 2, 1, 3).reshape(1, x.shape[1], -1)
        x = x + self.linear(f"{at}.self_attn.o_proj", self.norm(norms, f"{at}.self_attn.attn_sub_norm", out))
        h = self.norm(norms, f"{at}.post_attention_layernorm", x)
        gate, up = self.linear(f"{at}.mlp.gate_proj", h), self.linear(f"{at}.mlp.up_proj", h)
        hidden = (mx.maximum(gate, 0) ** 2 if c.hidden_act == "relu2" else nn.silu(gate)) * up
        return x + self.linear(f"{at}.mlp.down_proj", self.norm(norms, f"{at}.mlp.ffn_sub_norm", hidden))

    def __call__(self, norms: dict[str, mx.array], x: mx.array) -> mx.array:
        for i in range(self.c.num_hidden_layers):
            x = self.layer(norms, f"model.layers.{i}", x)
        return self.norm(norms, "model.norm", x) @ mx.array(self.w.lm_head.rows(slice(None))).T


def loss_of(logits: mx.array, tokens: list[int]) -> mx.array:
    return nn.losses.cross_entropy(logits[0] / 10, mx.array(tokens), reduction="mean")


@pytest.mark.parametrize("case", TRAINED)
def test_gradients_flow_through_a_whole_model_in_training(case: str) -> None:
    weights, tokens = build(case), ids(3, 13)
    x = mx.array(weights.embed_tokens.rows(np.array(tokens)))[None]
    norms = {name: mx.array(w) for name, w in weights.norms.items()}
    twin = Twin(weights)
    expected, (dnorms, dx) = mx.value_and_grad(lambda norms, x: loss_of(twin(norms, x), ids(4, 13)), argnums=(0, 1))(
        norms, x
    )

    model = MlxModel(weights)
    model.train()
    for _, module in model.named_modules():
        if type(module).__name__ == "RMSNorm":
            module.unfreeze()

    def loss(parameters: Any, x: mx.array) -> mx.array:
        model.update(parameters)
        return loss_of(model(mx.array([tokens]), None, x), ids(4, 13))

    found, (gnorms, gx) = mx.value_and_grad(loss, argnums=(0, 1))(model.trainable_parameters(), x)
    assert abs(float(found - expected)) < 1e-4 * abs(float(expected))
    flat = {name.removesuffix(".weight"): g for name, g in tree_flatten(gnorms)}
    assert set(flat) == set(dnorms)
    for name, d in [*dnorms.items(), ("x", dx)]:
        g = np.array(gx if name == "x" else flat[name])
        assert np.isfinite(g).all() and np.abs(np.array(d)).max() > 0
        np.testing.assert_allclose(g, np.array(d), rtol=0, atol=2e-3 * float(mx.abs(d).max()), err_msg=name)


class Lora(nn.Module):
    """The usual low-rank adapter around any layer."""

    def __init__(self, inner: nn.Module, k: int, n: int) -> None:
        super().__init__()
        self.inner, self.a, self.b = inner, floats(5, k, 4) / 10, mx.zeros((4, n))

    def __call__(self, x: mx.array) -> mx.array:
        return self.inner(x) + x @ self.a @ self.b


def test_adapters_learn_over_packed_weights() -> None:
    """Every step of plain descent lowers the loss, and the packed weights stay as they were."""
    weights, tokens = build("bitnet"), mx.array([ids(3, 24)])
    model = MlxModel(weights)
    for block in model.layers:
        for name in ("q_proj", "o_proj"):
            inner = block.self_attn[name]
            block.self_attn[name] = Lora(inner, inner.input_dims, inner.output_dims)
    names = {name for name, _ in tree_flatten(model.trainable_parameters())}
    assert len(names) == 8 and all(name.endswith((".a", ".b")) for name in names)
    before = [
        np.array(a) for name, a in tree_flatten(model.parameters()) if "_proj" in name and name.endswith("weight")
    ]
    model.train()

    def loss(model: MlxModel) -> mx.array:
        return nn.losses.cross_entropy(model(tokens[:, :-1])[0] / 10, tokens[0, 1:], reduction="mean")

    step, losses = nn.value_and_grad(model, loss), []
    for _ in range(6):
        value, grads = step(model)
        losses.append(float(value))
        model.update(tree_map(lambda p, g: p - 0.02 * g, model.trainable_parameters(), grads))
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 1e-3
    after = [np.array(a) for name, a in tree_flatten(model.parameters()) if "_proj" in name and name.endswith("weight")]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
