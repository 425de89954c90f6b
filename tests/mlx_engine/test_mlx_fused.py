"""The fused way through a layer: the bits of the plain way, no second copy of a weight, and when it is left."""

from __future__ import annotations

import shutil
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten, tree_map

from bitnet_mlx.backends.mlx_affine import Codes, StockOps
from bitnet_mlx.models import decoder_mlx
from bitnet_mlx.models.decoder_mlx import MlxModel
from bitnet_mlx.nn.bitlinear import BitLinear
from bitnet_mlx.nn.joined import Joined
from bitnet_mlx.nn.site import ModuleSite, PackedSite
from tests.mlx_engine.test_mlx_decoder import CASES, build, ids

NAMES = {"self_attn": "q_proj k_proj v_proj o_proj".split(), "mlp": "gate_proj up_proj down_proj".split()}


def logits(model: MlxModel, prompt: int = 11, steps: int = 3) -> np.ndarray:
    """A prompt's logits and those of a few single tokens behind it."""
    cache = model.make_cache()
    out = [model.step([ids(1, prompt)], [cache], "all")[0]]
    out += [model.step([[(5 + i) % 67]], [cache], "all")[0] for i in range(steps)]
    return np.concatenate(out)


class Counting(StockOps):
    """Counts the products of a step, and those that add a residual."""

    def __init__(self) -> None:
        self.products = self.residuals = 0

    def linear(
        self, codes: Codes, words: mx.array, scale: mx.array, bias: Any = None, residual: Any = None
    ) -> mx.array:
        self.products += 1
        self.residuals += residual is not None
        return super().linear(codes, words, scale, bias, residual)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("case", CASES)
def test_fused_and_plain_give_the_same_bits(case: str, bits: int, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MlxModel(build(case, activation_bits=bits), dtype=dtype)
    fused = logits(model)
    monkeypatch.setattr(Joined, "packed", lambda *_: None)
    assert all(isinstance(site, ModuleSite) for layer in model.layers for site in layer.sites())
    assert np.array_equal(fused, logits(model))


def test_a_layer_takes_four_products_and_two_residuals() -> None:
    ops = Counting()
    model = MlxModel(build("llama, group scales, biases, 6-bit head"), ops=ops)
    model.step([[1]], [model.make_cache()])
    assert (ops.products, ops.residuals) == (4 * len(model.layers), 2 * len(model.layers))


def test_what_is_mixed_is_fused_where_it_can_be() -> None:
    model = MlxModel(build("bitnet, two dense linears, 4-bit head"))  # up_proj and q_proj are float
    kinds = [type(site) for site in model.layers[0].sites()]
    assert kinds == [ModuleSite, PackedSite, ModuleSite, PackedSite]


@pytest.mark.parametrize("case", ["bitnet", "llama, group scales, biases, 6-bit head"])
def test_joined_weights_are_views_of_one_array(case: str) -> None:
    """Each layer keeps its own name and rows, inside the memory of the joined array."""
    weights = build(case)
    model = MlxModel(weights)
    for number, block in enumerate(model.layers):
        for site, part, names in ((0, "self_attn", NAMES["self_attn"][:3]), (2, "mlp", NAMES["mlp"][:2])):
            words, scale, bias = block.sites()[site].arrays.packed
            whole = np.array(words, copy=False)
            assert scale.shape[0] == words.shape[-2] and (bias is not None) == ("biases" in case)
            for name in names:
                layer, tensor = block[part][name], weights.layer_linear(number, f"{part}.{name}").weight
                assert np.array_equal(layer.to_tensor().words, tensor.words)
                assert np.array_equal(layer.to_tensor().scale, tensor.scale)
                view = np.array(layer.weight, copy=False)
                assert np.shares_memory(view, whole) and not view.flags.owndata
    names = {name for name, _ in tree_flatten(model.parameters())}
    assert not [name for name in names if "_qkv" in name or "_gate_up" in name]


def test_scales_of_unlike_kinds_join_as_rows_but_never_with_groups() -> None:
    from tests.support.random_model import random_ternary

    rng, ops = np.random.default_rng(0), StockOps()
    layers = [
        BitLinear(random_ternary(rng, n, 300, scale), ops=ops)
        for n, scale in ((5, "tensor"), (7, "row"), (3, "tensor"))
    ]
    x = mx.array(rng.standard_normal((1, 2, 300)).astype(np.float32))
    apart = [layer(x) for layer in layers]
    packed = Joined(layers).packed(layers)
    assert packed is not None and packed[1].shape == (15,)
    joined = ops.linear(ops.quantize(x), *packed)
    assert np.array_equal(joined, mx.concatenate(apart, axis=-1))
    assert np.array_equal(joined, mx.concatenate([layer(x) for layer in layers], axis=-1))
    layers[1] = BitLinear(random_ternary(rng, 7, 300, "group"), ops=ops)
    assert Joined(layers).packed(layers) is None
    layers[1] = BitLinear(random_ternary(rng, 7, 300), np.ones(7, np.float32), ops)
    assert Joined(layers).packed(layers) is None  # a bias of 0 for the others would turn -0 into 0


class Adapter(nn.Module):
    """Something that stands in for a layer, as LoRA does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __call__(self, x: mx.array) -> mx.array:
        return self.inner(x) + 1


@pytest.mark.parametrize("name", ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"])
def test_a_replaced_layer_is_called(name: str) -> None:
    model = MlxModel(build("bitnet"))
    before = logits(model)
    part = model.layers[0]["self_attn" if name in NAMES["self_attn"] else "mlp"]
    inner = part[name]
    part[name] = Adapter(inner)
    assert not np.array_equal(before, logits(model))
    part[name] = inner
    assert np.array_equal(before, logits(model))


def test_other_weights_and_other_scales_are_used() -> None:
    model, other = MlxModel(build("bitnet")), MlxModel(build("bitnet", seed=1))
    expected = logits(other)
    model.load_weights(list(tree_flatten(other.parameters())))
    assert np.array_equal(logits(model), expected)
    layer = model.layers[0].mlp.down_proj
    layer.scale = layer.scale * 2
    assert not np.array_equal(logits(model), expected)
    # The same arrays put back, as optimisers and tree_map do, change nothing.
    again = MlxModel(build("bitnet"))
    again.update(tree_map(lambda a: a, again.parameters()))
    again.unfreeze()
    assert all(isinstance(site, PackedSite) for block in again.layers for site in block.sites())


def test_training_mode_takes_the_plain_way() -> None:
    model = MlxModel(build("bitnet"))
    assert not model.layers[0].training
    expected = logits(model)
    model.train()
    assert all(isinstance(site, ModuleSite) for block in model.layers for site in block.sites())
    assert np.corrcoef(logits(model).ravel(), expected.ravel())[0, 1] > 0.9
    model.eval()
    assert np.array_equal(logits(model), expected)


def test_beginning_early_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU `step` starts the first layers while the rest of the graph is built; here the CPU device is made to."""
    weights = build("bitnet", num_hidden_layers=5)
    expected = logits(MlxModel(weights))
    started: list[int] = []
    monkeypatch.setattr(decoder_mlx, "_EARLY", 2)
    begin = decoder_mlx._begin
    monkeypatch.setattr(decoder_mlx, "_wait", lambda i, x: (started.append(i), begin(i, x)))
    assert np.array_equal(logits(MlxModel(weights)), expected)
    assert started == [*range(5)] * 4


class Compiling(StockOps):
    compiles = True
    eager = 0  # operations called from Python

    def linear(self, *args: Any, **kwargs: Any) -> mx.array:
        self.eager += 1
        return super().linear(*args, **kwargs)


if shutil.which("c++") or shutil.which("g++"):  # what MLX's CPU device compiles a graph with

    @pytest.mark.parametrize("case", ["bitnet", "llama, group scales, biases, 6-bit head"])
    def test_compiled_parts_give_the_eager_bits(case: str) -> None:
        weights, ops = build(case, num_hidden_layers=3), Compiling()
        expected = logits(MlxModel(weights), prompt=3)
        model = MlxModel(weights, ops=ops)
        assert np.array_equal(logits(model, prompt=3), expected)
        before = ops.eager
        logits(model, prompt=3)
        assert ops.eager == before  # traced once for each shape, and for all layers
        assert before == 2 * 8  # a prompt of 3 and single tokens; before, between and after three layers

    def test_compiled_parts_notice_every_exchange() -> None:
        model, plain = (MlxModel(build("bitnet"), ops=ops) for ops in (Compiling(), StockOps()))
        expected = logits(plain, prompt=3)

        def agree(change: Any) -> None:
            undo = [change(m) for m in (model, plain)]
            found = logits(model, prompt=3)
            assert np.array_equal(found, logits(plain, prompt=3)) and not np.array_equal(found, expected)
            for back in undo:
                back()
            assert np.array_equal(logits(model, prompt=3), expected)

        def put(owner: Any, name: str, value: Any) -> Any:
            kept = owner[name]
            owner[name] = value
            return lambda: owner.update({name: kept}) if isinstance(kept, mx.array) else owner.__setitem__(name, kept)

        assert np.array_equal(logits(model, prompt=3), expected)
        agree(lambda m: put(m.layers[1].self_attn, "v_proj", Adapter(m.layers[1].self_attn.v_proj)))
        agree(lambda m: put(m.layers[0].mlp.down_proj, "scale", m.layers[0].mlp.down_proj.scale * 2))
        agree(lambda m: put(m.layers[1].input_layernorm, "weight", m.layers[1].input_layernorm.weight[::-1]))
        layers = model.layers[::-1], plain.layers[::-1]
        for m, turned in zip((model, plain), layers, strict=True):
            m.model.layers = turned
        assert np.array_equal(logits(model, prompt=3), logits(plain, prompt=3))
        model.train()
        mx.grad(lambda x: model(mx.array([[1, 2]]), None, x).sum())(mx.zeros((1, 2, 72)))  # kernels have no gradient
