"""Stock MLX products and codes on every boundary shape, against plain integer arithmetic."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from bitnet_mlx.backends import mlx_affine
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
