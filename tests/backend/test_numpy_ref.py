"""The numpy reference against plain integer arithmetic, on every boundary shape."""

from __future__ import annotations

import numpy as np
import pytest

from bitnet_mlx import ternary
from bitnet_mlx.backends import numpy_ref
from tests.backend import shapes


class Reference:
    accumulate = staticmethod(numpy_ref.accumulate)
    linear = staticmethod(numpy_ref.quantized_linear)


@pytest.mark.parametrize(("n", "k"), shapes.PAIRS)
def test_products_equal_integer_arithmetic(n: int, k: int) -> None:
    shapes.check_products(n, k, Reference())


@pytest.mark.parametrize("k", shapes.K)
def test_codes_equal_plain_rounding(k: int) -> None:
    shapes.check_codes(k, ternary.quantize_activations)


@pytest.mark.parametrize("k", shapes.K)
def test_norm_and_quantise_gives_the_codes_of_the_product_with_the_norms_weight(k: int) -> None:
    """The norm's factor cancels: a row at or above the floor has the codes of x * weight, whatever its mean square."""
    x = shapes.inputs(k)
    weight = np.random.default_rng((k, 2)).uniform(0.5, 1.5, k).astype(np.float32)
    q, s = numpy_ref.norm_quantize(x, weight, 1e-5)
    wide = x.astype(np.float64)
    factor = 1 / np.sqrt((wide**2).mean(axis=1) + 1e-5)
    top = np.abs(wide * weight).max(axis=1) * factor
    np.testing.assert_allclose(s, 127 / np.maximum(top, 1e-5), rtol=1e-6)
    large = top > 2e-5
    assert 10 < large.sum() < len(x)
    expected, _ = shapes.expected_codes(shapes.f32(wide[large] * weight).astype(np.float32))
    shapes.same(q[large], expected, f"codes after a norm, K {k}")


def test_half_up_rounding_and_another_order_of_the_scales_are_caught() -> None:
    """The data can tell a wrong backend from a right one."""

    def half_up(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        _, s = ternary.quantize_activations(x)
        return np.clip(np.floor(x * s[:, None] + np.float32(0.5)), -128, 127).astype(np.int8), s

    class OneDivision(Reference):
        """acc / (s / scale): one rounding in another place."""

        @staticmethod
        def linear(q: np.ndarray, s: np.ndarray, weight: ternary.TernaryTensor, bias: np.ndarray | None) -> np.ndarray:
            y = numpy_ref.accumulate(q, weight).astype(np.float32) / (s[:, None] / weight.scale)
            return y if bias is None else y + bias

    with pytest.raises(AssertionError, match="codes"):
        shapes.check_codes(100, half_up)
    with pytest.raises(AssertionError, match="outputs, M ., N 33, K 100, scale by tensor"):
        shapes.check_products(33, 100, OneDivision())
