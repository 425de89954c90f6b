"""BitLinear, norms and the layers that are not ternary, as modules of MLX."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten

from bitnet_mlx.backends import mlx_affine, numpy_ref
from bitnet_mlx.backends.mlx_affine import Codes, StockOps
from bitnet_mlx.errors import ConfigError, FormatError
from bitnet_mlx.formats.dense import DenseRows, GroupedRows, float32_to_bfloat16, quantize_rows
from bitnet_mlx.nn.bitlinear import BitLinear
from bitnet_mlx.nn.dense import DenseLinear, GroupedLinear, head_layer, linear_layer, pack_affine
from bitnet_mlx.nn.joined import Joined
from bitnet_mlx.nn.norm import RMSNorm
from bitnet_mlx.ternary import ternarize
from tests.support.random_model import random_rows, random_ternary


def rng_floats(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("scale", ["tensor", "row", "group"])
def test_bitlinear_equals_the_reference_and_gives_its_tensor_back(scale: str) -> None:
    w = random_ternary(np.random.default_rng(0), 33, 300, scale)
    bias, x = rng_floats(1, 33), rng_floats(2, 2, 3, 300)
    layer = BitLinear.from_tensor(w, bias)
    expected = numpy_ref.ternary_linear(x.reshape(6, 300), w, bias).reshape(2, 3, 33)
    assert np.array_equal(np.array(layer(mx.array(x))), expected)
    assert np.array_equal(np.array(mx.compile(layer)(mx.array(x))), expected)
    back = layer.to_tensor()
    assert np.array_equal(back.words, w.words) and np.array_equal(back.scale, w.scale)
    assert (back.shape, back.activation_bits) == (w.shape, w.activation_bits)


def test_codes_made_once_serve_several_layers() -> None:
    rng = np.random.default_rng(4)
    x, weight = rng_floats(5, 3, 100), 1 + rng_floats(6, 100) / 10
    codes = RMSNorm(weight, 1e-5).quantize(mx.array(x))
    for n in (1, 5, 64):
        w = random_ternary(rng, n, 100, "row")
        expected = numpy_ref.quantized_linear(*numpy_ref.norm_quantize(x, weight, 1e-5), w)
        assert np.array_equal(np.array(BitLinear(w)(codes)), expected)


def test_bitlinear_from_a_float_layer_is_absmean_ternarised() -> None:
    linear = nn.Linear(100, 33)
    linear.weight = mx.array(rng_floats(7, 33, 100)).astype(mx.bfloat16)
    linear.bias = mx.array(rng_floats(8, 33))
    layer = BitLinear.from_linear(linear)
    t, m = ternarize(np.array(linear.weight.astype(mx.float32)))
    tensor = layer.to_tensor()
    assert np.array_equal(tensor.rows(slice(None)), t * m) and tensor.scale == m
    assert np.array_equal(np.array(layer.bias), np.array(linear.bias))
    assert set(np.unique(t)) == {-1, 0, 1}
    assert "bias" not in BitLinear.from_linear(nn.Linear(10, 3, bias=False))
    linear.weight = mx.full((33, 100), float("nan"))
    with pytest.raises(FormatError, match="NaN"):
        BitLinear.from_linear(linear)


def test_packed_weights_are_never_trainable() -> None:
    layer = BitLinear(random_ternary(np.random.default_rng(0), 5, 10), rng_floats(0, 5))
    assert set(layer.parameters()) == {"weight", "scale", "bias"}
    assert layer.trainable_parameters() == {}
    layer.unfreeze()
    assert layer.trainable_parameters() == {}
    block = nn.Sequential(layer, nn.Linear(5, 2))
    block.unfreeze()
    assert {name for name, _ in tree_flatten(block.trainable_parameters())} == {"layers.1.weight", "layers.1.bias"}


def test_bitlinear_prints_what_it_is_and_refuses_other_widths() -> None:
    layer = BitLinear(random_ternary(np.random.default_rng(0), 5, 10, "row"))
    text = repr(layer)
    for part in ("input_dims=10", "output_dims=5", "bias=False", "scale per row", "activation_bits=8", "ops=mlx"):
        assert part in text
    with pytest.raises(ConfigError, match="11 columns; the layer takes 10"):
        layer(mx.zeros((1, 11)))
    with pytest.raises(ConfigError, match="11 columns"):
        layer(layer.ops.quantize(mx.zeros((1, 11))))
    with pytest.raises(ConfigError, match="bias has shape"):
        BitLinear(random_ternary(np.random.default_rng(0), 5, 10), np.zeros(4, np.float32))


def test_another_backend_can_take_the_operations() -> None:
    """What a Metal backend will do: the layer calls the object it was given, for arranging and for computing."""

    class Counting(StockOps):
        name = "counting"
        calls = 0

        def linear(self, codes: Codes, *args: Any, **kwargs: Any) -> mx.array:
            self.calls += 1
            return super().linear(codes, *args, **kwargs)

    ops = Counting()
    layer = BitLinear(random_ternary(np.random.default_rng(0), 5, 10), ops=ops)
    layer(mx.zeros((1, 10)))
    assert ops.calls == 1 and "ops=counting" in repr(layer)


def test_a_call_that_was_never_computed_leaves_nothing_to_its_thread() -> None:
    layer, x = BitLinear(random_ternary(np.random.default_rng(0), 5, 10)), mx.array(rng_floats(0, 2, 10))
    mlx_affine._units.cache_clear()
    with ThreadPoolExecutor(1) as other:
        other.submit(lambda: layer(x)).result()
    assert np.isfinite(np.array(layer(x))).all()


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("k", [64, 72, 128, 320])
def test_grouped_rows_are_mlx_affine_words(bits: int, k: int) -> None:
    """MLX's own dequantize reads our words; the product is that of the rows, to float32's rounding."""
    matrix = random_rows(np.random.default_rng(k), 17, k, str(bits))
    assert isinstance(matrix, GroupedRows)
    words = pack_affine(matrix.codes, bits)
    groups = np.ones((17, -(-k // 64)), np.float32)
    codes = mx.dequantize(
        mx.array(words), mx.array(groups), mx.array(groups * -(2 ** (bits - 1))), group_size=64, bits=bits
    )
    assert np.array_equal(np.array(codes)[:, :k], matrix.codes) and not np.array(codes)[:, k:].any()
    layer = GroupedLinear(matrix, rng_floats(1, 17))
    x = rng_floats(3, 2, 2, k)
    expected = numpy_ref.dense_linear(x.reshape(4, k), matrix, np.array(layer.bias)).reshape(2, 2, 17)
    np.testing.assert_allclose(np.array(layer(mx.array(x))), expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    index = np.array([[16, 0], [3, 3]])
    assert np.array_equal(np.array(layer.rows(mx.array(index))), matrix.rows(index))


def test_extreme_codes_survive_packing() -> None:
    w = np.tile(np.array([[1, -1, 0, 0.5]], np.float32), (2, 16))
    for bits in (8, 6, 4):
        matrix = quantize_rows(w, bits)
        assert matrix.codes.max() == 2 ** (bits - 1) - 1
        assert np.array_equal(np.array(GroupedLinear(matrix).rows(mx.arange(2))), matrix.rows(slice(None)))


@pytest.mark.parametrize("storage", ["float32", "float16", "bfloat16"])
def test_dense_rows_multiply_in_float32_for_float32_inputs(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitnet_mlx.nn.dense._ROWS_AT_ONCE", 5)
    w = rng_floats(0, 17, 72)
    data = float32_to_bfloat16(w) if storage == "bfloat16" else w.astype(storage)
    matrix = DenseRows(data, storage)
    layer = linear_layer(matrix, rng_floats(1, 17))
    x = rng_floats(2, 3, 72)
    expected = numpy_ref.dense_linear(x, matrix, np.array(layer.bias))
    y = layer(mx.array(x))
    assert y.dtype == mx.float32
    np.testing.assert_allclose(np.array(y), expected, rtol=0, atol=1e-5)
    rows = layer.rows(mx.array([3, 1]))
    assert rows.dtype == layer.weight.dtype
    assert np.array_equal(np.array(rows.astype(mx.float32)), matrix.rows(np.array([3, 1])))
    assert layer(mx.array(x).astype(mx.bfloat16)).dtype == mx.bfloat16


def test_layers_by_storage() -> None:
    rng = np.random.default_rng(0)
    w = random_ternary(rng, 5, 10)
    assert isinstance(linear_layer(random_rows(rng, 5, 10, "bfloat16")), DenseLinear)
    assert isinstance(linear_layer(random_rows(rng, 5, 10, "8")), GroupedLinear)
    assert isinstance(linear_layer(w), BitLinear)
    head = head_layer(w)  # a ternary head reads plain activations, as the reference's does
    assert isinstance(head, BitLinear) and head.activation_bits == 16
    x = rng_floats(1, 2, 10)
    np.testing.assert_allclose(np.array(head(mx.array(x))), numpy_ref.dense_linear(x, w), atol=1e-5)
    assert head_layer(replace(w, activation_bits=16)).activation_bits == 16


@pytest.mark.parametrize("k", [8, 100, 2560])
def test_rms_norm_equals_the_reference(k: int) -> None:
    x, weight = rng_floats(0, 4, k) * 3, rng_floats(1, k)
    norm = RMSNorm(weight, 1e-6)
    assert np.array_equal(np.array(norm(mx.array(x))), numpy_ref.rms_norm(x, weight, 1e-6))
    narrow = norm(mx.array(x).astype(mx.bfloat16))
    assert narrow.dtype == mx.bfloat16


def test_linears_of_unlike_activations_do_not_join() -> None:
    rng = np.random.default_rng(0)
    a, b = (random_ternary(rng, 8, 128, "row") for _ in range(2))
    other = replace(b, activation_bits=16)
    ops = StockOps()
    alike, unlike = ([BitLinear(w, ops=ops) for w in pair] for pair in ((a, b), (a, other)))
    assert Joined(alike).packed(alike) is not None
    assert Joined(unlike).packed(unlike) is None
