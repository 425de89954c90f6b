"""The quantisers against the formulas done in exact rational arithmetic and by hand."""

from __future__ import annotations

import ast
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from bitnet_mlx.errors import FormatError
from bitnet_mlx.formats import words2
from bitnet_mlx.ternary import TernaryTensor, matmul, quantize_activations, scale_output, ternarize


def test_ternarize_by_hand() -> None:
    t, m = ternarize(np.array([[2.0, -1.0, 0.0], [0.25, -0.25, 2.5]], np.float32))
    assert m == np.float32(1.0)
    assert t.tolist() == [[1, -1, 0], [0, 0, 1]]


def test_ternarize_rounds_half_to_even() -> None:
    # mean|W| is 1, so 0.5 and -0.5 are ties: they go to 0, not away from it.
    t, m = ternarize(np.array([0.5, -0.5, 1.5, -1.5], np.float32))
    assert m == np.float32(1.0)
    assert t.tolist() == [0, 0, 1, -1]


def test_ternarize_multiplies_by_the_inverse_of_the_mean() -> None:
    """The mean is 25; 12.5 and one step times 1 / 25 is a tie, as torch computes it, and divided by 25 it is above one."""
    t, m = ternarize(np.array([np.nextafter(np.float32(12.5), np.float32(13)), -37.5], np.float32))
    assert m == np.float32(25)
    assert t.tolist() == [0, -1]


def test_the_mean_is_exact_whatever_the_order_of_the_weights() -> None:
    w = np.random.default_rng(0).standard_normal((7, 1000)).astype(np.float32)
    w[0] *= 10_000
    exact = np.float32(math.fsum(np.abs(w).astype(np.float64).reshape(-1).tolist()) / w.size)
    assert ternarize(w)[1] == ternarize(w[::-1])[1] == exact


@pytest.mark.parametrize("value", [0, 1e-6, -4e-6])
def test_ternarize_of_weights_near_zero_takes_the_floor(value: float) -> None:
    t, m = ternarize(np.full((3, 4), value, np.float32))
    assert m == np.float32(1e-5)
    assert not t.any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_ternarize_refuses_what_is_not_finite(bad: float) -> None:
    with pytest.raises(FormatError, match="NaN or infinity"):
        ternarize(np.array([1.0, bad], np.float32))


def test_activations_against_rational_arithmetic() -> None:
    """Where the exact product is not within rounding of a tie, the code is the exact one, rounded."""
    x = np.random.default_rng(3).standard_normal((4, 300)).astype(np.float32)
    q, s = quantize_activations(x)
    for row in range(4):
        top = max(abs(Fraction(float(v))) for v in x[row])
        assert abs(Fraction(float(s[row])) * top / 127 - 1) < Fraction(1, 2**23)
        for column in range(300):
            exact = Fraction(float(x[row, column])) * 127 / top
            if abs(abs(exact - int(exact)) - Fraction(1, 2)) > Fraction(1, 10**4):
                assert q[row, column] == round(exact)


def test_activations_ties_extremes_and_zeros() -> None:
    x = np.array([[127.0, 0.5, 1.5, 2.5, -0.5, -127.0], [0.0] * 6, [3.0] * 6, [1e-9] * 6], np.float32)
    q, s = quantize_activations(x)
    assert q[0].tolist() == [127, 0, 2, 2, 0, -127]
    assert not q[1].any() and s[1] == np.float32(127) / np.float32(1e-5)
    assert (q[2] == 127).all()
    assert not q[3].any()  # below the floor of 1e-5: 1e-9 * 127 / 1e-5 rounds to 0


def test_scale_output_order_is_divide_then_multiply() -> None:
    acc = np.arange(-5000, 5000, 7)[None]
    s, scale = np.array([3.7], np.float32), np.asarray(0.31, np.float32)
    assert np.array_equal(scale_output(acc, s, scale), (acc.astype(np.float32) / s[:, None]) * scale)


def test_scale_output_adds_groups_in_ascending_order() -> None:
    rng = np.random.default_rng(0)
    acc = rng.integers(-9999, 9999, (2, 5, 3))
    s, scale = rng.uniform(1, 9, 2).astype(np.float32), rng.uniform(0.1, 2, (3, 5)).astype(np.float32)
    y = scale_output(acc, s, scale)
    for m in range(2):
        for n in range(3):
            want = np.float32(0)
            for g in range(5):
                want = want + (np.float32(acc[m, g, n]) / s[m]) * scale[n, g]
            assert y[m, n] == want


def test_tensor_refuses_words_of_another_shape() -> None:
    words = words2.pack(np.zeros((3, 100), np.int8))
    one = np.asarray(1, np.float32)
    with pytest.raises(FormatError, match="needs uint32"):
        TernaryTensor(words[:2], one, (3, 100))
    with pytest.raises(FormatError, match="words are int32"):
        TernaryTensor(words.view(np.int32), one, (3, 100))
    with pytest.raises(FormatError, match="scale is float64"):
        TernaryTensor(words, one.astype(np.float64), (3, 100))
    with pytest.raises(FormatError, match="takes float32 of shape"):
        TernaryTensor(words, np.ones(2, np.float32), (3, 100))
    with pytest.raises(FormatError, match="8 or 16"):
        TernaryTensor(words, one, (3, 100), activation_bits=4)


@pytest.mark.parametrize("scale_shape", [(), (3,), (3, 2)])
def test_rows_are_the_scaled_weights(scale_shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    t = rng.integers(-1, 2, (3, 200)).astype(np.int8)
    scale = np.asarray(rng.uniform(0.5, 2, scale_shape), np.float32)
    tensor = TernaryTensor(words2.pack(t), scale, (3, 200))
    if scale.ndim == 2:
        per_weight = np.repeat(scale, 128, axis=1)[:, :200]
    else:
        per_weight = np.broadcast_to(np.reshape(scale, (-1, 1)), (3, 200))
    assert np.array_equal(tensor.rows(np.array([2, 0])), (t * per_weight)[[2, 0]])


def test_a_product_raises_no_flag_that_a_macs_blas_would_raise_by_chance() -> None:
    a = np.array([[np.inf, 1e300]])
    with np.errstate(all="raise"):
        assert np.isnan(matmul(a, np.array([[0.0], [1e300]]))).all()
        assert matmul(np.array([[1.0, 2.0]]), np.array([[3.0], [4.0]])).tolist() == [[11.0]]


def test_numpys_products_are_all_made_there() -> None:
    """A module that takes numpy and not MLX has no `a @ b` of its own, but for the file of integers."""
    package = Path(__file__).parents[2] / "bitnet_mlx"
    found = set()
    for path in package.rglob("*.py"):
        text = path.read_text()
        tree = ast.parse(text)
        names = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
        }
        if "np" in names and "mx" not in names and any(isinstance(node, ast.MatMult) for node in ast.walk(tree)):
            found.add(path.relative_to(package).as_posix())
    assert found == {"ternary.py", "formats/trits5.py"}
