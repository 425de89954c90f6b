"""Stock MLX against numpy: equal accumulators, codes and outputs, to the last bit."""

from __future__ import annotations

import itertools

import mlx.core as mx
import numpy as np
import pytest

from bitnet_mlx.backends import mlx_affine, numpy_ref
from bitnet_mlx.backends.mlx_affine import StockOps
from bitnet_mlx.formats import words2
from bitnet_mlx.ternary import GROUP, TernaryTensor, padded, quantize_activations
from tests.support.random_model import random_ternary

OPS = StockOps()


def arranged(w: TernaryTensor) -> tuple[mx.array, mx.array]:
    scale = mx.array(w.scale)
    return OPS.arrange(mx.array(w.words), scale), scale


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("k", [128, 6912])
@pytest.mark.parametrize("scale", ["tensor", "group"])
def test_the_largest_accumulators_are_exact(k: int, scale: str) -> None:
    t = np.ones((3, k), np.int8)
    t[1] = -1
    t[2, ::2] = -1
    shape = () if scale == "tensor" else (3, padded(k) // GROUP)
    w = TernaryTensor(words2.pack(t), np.full(shape, 0.3, np.float32), t.shape)
    q = np.full((2, k), -128, np.int8)
    q[1] = 127
    acc = np.array(mlx_affine.accumulate(mx.array(q), arranged(w)[0]))
    assert np.array_equal(acc, numpy_ref.accumulate(q, w))
    total = acc if scale == "tensor" else acc.sum(axis=1)
    assert np.array_equal(total, q.astype(np.int64) @ t.astype(np.int64).T)


def test_rows_cut_into_pieces_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of MLX's CUDA device, which cannot take many rows at once, run here by its limit alone."""
    rng = np.random.default_rng(5)
    monkeypatch.setattr(mlx_affine, "row_limit", lambda: 4)
    for (m, n, k), scale in itertools.product([(4, 3, 8), (9, 33, 100), (17, 5, 300)], ["row", "group"]):
        w = random_ternary(rng, n, k, scale)
        q = rng.integers(-128, 128, (m, k)).astype(np.int8)
        acc = np.array(mlx_affine.accumulate(mx.array(q), arranged(w)[0]))
        assert np.array_equal(acc, numpy_ref.accumulate(q, w))


def test_quantiser_ties_and_floors() -> None:
    """Halves go to even, a row of zeros and a row below the floor keep a finite scale, and -0 stays a zero."""
    x = np.array(
        [[127, 0.5, 1.5, 2.5, -0.5, -126.5], [0, 0, -0.0, 0, 0, 0], [1e-7, -2e-7, 0, 0, 9e-6, 0], [3e38, 1, 0, -3e38, 0, 0]],
        np.float32,
    )  # fmt: skip
    q, s = quantize_activations(x)
    codes = OPS.quantize(mx.array(x))
    assert np.array_equal(np.array(codes.q), q) and same_bits(np.array(codes.s)[:, 0], s)
    assert q[0].tolist() == [127, 0, 2, 2, 0, -126]


@pytest.mark.parametrize("k", [8, 31, 100, 2560, 6912])
def test_norm_and_quantise_equal_the_reference_on_the_cpu_device(k: int) -> None:
    rng = np.random.default_rng(k)
    x = (rng.standard_normal((9, k)) * np.array([1e-9, 1e-4, 0.1, 1, 3, 10, 100, 1e4, 0])[:, None]).astype(np.float32)
    weight = rng.standard_normal(k).astype(np.float32)
    q, s = numpy_ref.norm_quantize(x, weight, 1e-5)
    codes = OPS.norm_quantize(mx.array(x), mx.array(weight), 1e-5)
    assert np.array_equal(np.array(codes.q), q) and same_bits(np.array(codes.s)[:, 0], s)


@pytest.mark.parametrize("scale", ["tensor", "row", "group"])
@pytest.mark.parametrize(("n", "k"), [(1, 8), (5, 10), (33, 100), (64, 2560)])
def test_float_activations_stay_within_the_stated_tolerance(n: int, k: int, scale: str) -> None:
    rng = np.random.default_rng(n)
    w = random_ternary(rng, n, k, scale, bits=16)
    x = rng.standard_normal((3, k)).astype(np.float32)
    exact = x.astype(np.float64) @ w.rows(slice(None)).astype(np.float64).T
    bound = np.abs(x).astype(np.float64) @ np.abs(w.rows(slice(None))).astype(np.float64).T * padded(k) * 2.0**-24
    y = np.array(OPS.float_linear(mx.array(x), *arranged(w)))
    assert np.all(np.abs(y - exact) <= bound + 1e-12)


@pytest.mark.parametrize("scale", ["tensor", "row", "group"])
def test_rows_and_restore_give_back_what_was_packed(scale: str) -> None:
    w = random_ternary(np.random.default_rng(1), 7, 300, scale)
    words, factor = arranged(w)
    index = np.array([[6, 0, 3], [1, 1, 5]])
    rows = np.array(OPS.rows(words, factor, mx.array(index), 300))
    assert same_bits(rows.reshape(-1, 300), w.rows(index.reshape(-1)))
    assert np.array_equal(np.array(OPS.restore(words)), w.words)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_narrow_activations_are_quantised_in_float32(dtype: mx.Dtype) -> None:
    rng = np.random.default_rng(3)
    w = random_ternary(rng, 33, 100, "row")
    x = mx.array(rng.standard_normal((2, 3, 100)).astype(np.float32)).astype(dtype)
    y = OPS.linear(OPS.quantize(x), *arranged(w))
    assert y.dtype == dtype and y.shape == (2, 3, 33)
    expected = numpy_ref.ternary_linear(np.array(x.astype(mx.float32)).reshape(6, 100), w)
    assert np.array_equal(
        np.array(y.astype(mx.float32)), np.array(mx.array(expected).astype(dtype).astype(mx.float32)).reshape(2, 3, 33)
    )
