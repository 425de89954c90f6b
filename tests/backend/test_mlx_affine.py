"""Stock MLX products and codes on every boundary shape, against plain integer arithmetic."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from bitnet_mlx.backends import mlx_affine, numpy_ref
from bitnet_mlx.ternary import TernaryTensor
from tests.backend import shapes


class Stock:
    """mlx_affine with numpy arrays in and out."""

    ops = mlx_affine.StockOps()

    def accumulate(self, q: np.ndarray, weight: TernaryTensor) -> np.ndarray:
        words = self.ops.arrange(mx.array(weight.words), mx.array(weight.scale))
        return np.array(mlx_affine.accumulate(mx.array(q), words))

    def linear(self, q: np.ndarray, s: np.ndarray, weight: TernaryTensor, bias: np.ndarray | None) -> np.ndarray:
        scale = mx.array(weight.scale)
        codes = mlx_affine.Codes(mx.array(q).astype(mx.float32), mx.array(s)[:, None], mx.float32)
        words = self.ops.arrange(mx.array(weight.words), scale)
        return np.array(self.ops.linear(codes, words, scale, None if bias is None else mx.array(bias)))


def quantize(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    codes = mlx_affine.quantize(mx.array(x))
    return np.array(codes.q), np.array(codes.s)[:, 0]


@pytest.mark.parametrize(("n", "k"), shapes.PAIRS)
def test_products_equal_integer_arithmetic(n: int, k: int) -> None:
    shapes.check_products(n, k, Stock())


@pytest.mark.parametrize("k", shapes.K)
def test_codes_equal_plain_rounding(k: int) -> None:
    shapes.check_codes(k, quantize)


@pytest.mark.parametrize("size", [1.0, 1e-6, 1e-9, 0.0])
def test_the_floor_of_the_quantiser_behind_a_norm_is_the_references(size: float) -> None:
    """A norm makes 1e-6 large enough, and 1e-9 not."""
    rng = np.random.default_rng(3)
    x = (size * rng.standard_normal((4, 96))).astype(np.float32)
    weight = rng.uniform(0.5, 2, 96).astype(np.float32)
    q, s = numpy_ref.norm_quantize(x, weight, 1e-12)
    found = mlx_affine.norm_quantize(mx.array(x), mx.array(weight), 1e-12)
    assert np.array_equal(np.array(found.q), q) and np.array_equal(np.array(found.s)[:, 0], s)
