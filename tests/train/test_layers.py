"""The straight-through layers against numbers worked out by hand, and against the package's own arithmetic."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from bitnet_mlx.backends import numpy_ref as ref
from bitnet_mlx.formats import words2
from bitnet_mlx.ternary import TernaryTensor, quantize_activations, ternarize
from bitnet_mlx.train.layers import FixedLinear, QATLinear
from bitnet_mlx.train.ste import STANDARD, STE, activation_parts, quantize_input, quantize_weight, ternary_parts

# mean|W| = (0.5 + 1 + 0.25 + 0.25) / 4 = 0.5, so W / m = 1, -2, 0.5, -0.5: rounded half to even 1, -2 -> -1, 0, 0.
WEIGHT = mx.array([[0.5, -1.0], [0.25, -0.25]])
TERNARY = np.array([[0.5, -0.5], [0.0, 0.0]], np.float32)


def linear(weight: mx.array, ste: STE | None = STANDARD) -> QATLinear:
    layer = QATLinear(*weight.shape, 0.02, ste)
    layer.weight = weight
    return layer


def test_weights_by_hand() -> None:
    np.testing.assert_array_equal(np.array(quantize_weight(WEIGHT)), TERNARY)


def test_inputs_by_hand() -> None:
    # 127 / 2 = 63.5: codes 127, rint(-0.5 * 63.5 = -31.75) = -32, rint(0.01 * 63.5 = 0.635) = 1.
    x = mx.array([[2.0, -0.5, 0.01]])
    np.testing.assert_allclose(np.array(quantize_input(x))[0], [2.0, -32 / 63.5, 1 / 63.5], rtol=1e-7)


def test_gradients_pass_straight_through() -> None:
    """y = xq wq^T, so with the loss g . y the gradients are g^T xq for W and g wq for x, whatever was rounded."""
    x, g = mx.array([[2.0, -0.5], [0.1, 0.3]]), mx.array([[1.0, 10.0], [-2.0, 0.5]])
    layer = linear(WEIGHT)

    def loss(weight: mx.array, x: mx.array) -> mx.array:
        layer.weight = weight
        return (layer(quantize_input(x)) * g).sum()

    dw, dx = mx.grad(loss, argnums=(0, 1))(WEIGHT, x)
    s = np.array([[127 / 2], [127 / 0.3]])
    xq = np.array([[127, -32], [42, 127]]) / s
    np.testing.assert_allclose(np.array(dw), np.array(g).T @ xq, rtol=1e-6)
    np.testing.assert_allclose(np.array(dx), np.array(g) @ TERNARY, rtol=1e-6)


def test_the_float_twin_has_plain_gradients() -> None:
    x = mx.array([[2.0, -0.5]])
    layer = linear(WEIGHT, None)
    np.testing.assert_allclose(np.array(layer(x)), [[1.5, 0.625]])


@pytest.mark.parametrize("k", [8, 100, 384])
def test_codes_equal_the_definition(k: int) -> None:
    """Codes to the last bit; the output up to the roundings in the sum of m, which MLX takes in another order."""
    rng = np.random.default_rng(k)
    x = rng.standard_normal((7, k)).astype(np.float32) * np.float32(3)
    w = rng.standard_normal((33, k)).astype(np.float32) * np.float32(0.02)
    t, m = ternarize(w)
    got_t, got_m = ternary_parts(mx.array(w))
    np.testing.assert_array_equal(np.array(got_t).astype(np.int8), t)
    np.testing.assert_allclose(got_m.item(), m, rtol=1e-5)
    q, s = quantize_activations(x)
    got_q, got_s = activation_parts(mx.array(x))
    np.testing.assert_array_equal(np.array(got_q).astype(np.int8), q)
    np.testing.assert_array_equal(np.array(got_s)[:, 0], s)
    want = ref.ternary_linear(x, TernaryTensor(words2.pack(t), np.asarray(m), w.shape))
    got = np.array(linear(mx.array(w))(quantize_input(mx.array(x))))
    np.testing.assert_allclose(got, want, rtol=3e-5, atol=3e-5 * np.abs(want).max())
    fixed = FixedLinear(mx.array(t.astype(np.float32)), mx.array(m))
    np.testing.assert_allclose(np.array(fixed(quantize_input(mx.array(x)))), want, rtol=1e-6)


def test_bfloat16_inputs_are_quantised_in_float32() -> None:
    x = mx.array(np.random.default_rng(0).standard_normal((5, 64)), mx.bfloat16)
    q, _ = quantize_activations(np.array(x.astype(mx.float32)))
    np.testing.assert_array_equal(np.array(activation_parts(x)[0]).astype(np.int8), q)


def test_rows_of_zeros_stay_zero() -> None:
    assert np.all(np.array(quantize_input(mx.zeros((2, 8)))) == 0)
