"""Other compilers and other chips: what depends on them gives other results under a flag, what does not the same."""

from __future__ import annotations

import numpy as np
import pytest

from bitnet_mlx.backends.kernels import source
from tests.emulator import compiler, emulate
from tests.emulator.probe import launch, matvec

RNG = np.random.default_rng(3)
X, Y, Z = (RNG.standard_normal(64).astype(np.float32) for _ in range(3))


def run(expression, *flags, header="", **inputs):
    inputs = inputs or {"x": X, "y": Y, "z": Z}
    body = f"uint i = thread_position_in_grid.x; out[i] = {expression};"
    made = launch(body, inputs, {"out": ((64,), "float32")}, grid=(64, 1, 1), header=header)
    return emulate(made, flags=flags)[0]


def rounded(v):
    return v.astype(np.float32).astype(np.float64)


ONE = rounded(X.astype(np.float64) * Y + Z)  # one rounding
TWO = rounded(rounded(X.astype(np.float64) * Y) + Z)  # two


def test_products_and_sums_are_contracted_or_not():
    assert not np.array_equal(ONE, TWO)
    np.testing.assert_array_equal(run("x[i] * y[i] + z[i]"), TWO)
    np.testing.assert_array_equal(run("x[i] * y[i] + z[i]", "contract"), ONE)
    np.testing.assert_array_equal(run("fma(x[i], y[i], z[i])"), ONE)
    np.testing.assert_array_equal(run("fma(x[i], y[i], z[i])", "split_fma"), TWO)


def test_a_pragma_stops_contraction():
    header = """
        inline float exact(float a, float b) {
        #pragma clang fp contract(off)
          return a * b;
        }
    """
    np.testing.assert_array_equal(run("exact(x[i], y[i]) + z[i]", "contract", header=header), TWO)


def test_fast_math_divides_roughly_and_precise_functions_do_not():
    np.testing.assert_array_equal(run("x[i] / y[i]"), X / Y)
    rough = run("x[i] / y[i]", "fast_math")
    np.testing.assert_allclose(rough, X / Y, rtol=1e-6)
    assert not np.array_equal(rough, X / Y)
    np.testing.assert_array_equal(run("precise::sqrt(x[i] * x[i])", "fast_math"), np.sqrt(X * X))
    assert not np.array_equal(run("sqrt(x[i] * x[i])", "fast_math"), np.sqrt(X * X))
    np.testing.assert_array_equal(run("precise::divide(x[i], y[i])", "fast_math"), X / Y)


@pytest.mark.parametrize("flag", ["fast_math", "contract"])
def test_the_kernels_own_roundings_hold_in_every_math_mode(flag):
    header = source.read("common.h")
    for expression, expected in (
        ("add_rn(mul_rn(x[i], y[i]), z[i])", TWO),
        ("div_rn(x[i], y[i])", X / Y),
        ("mul_rn(div_rn(x[i], y[i]), z[i])", X / Y * Z),
        ("sqrt_rn(mul_rn(x[i], x[i]))", np.sqrt(X * X)),
    ):
        np.testing.assert_array_equal(run(expression, flag, header=header), expected)


def test_half_denormals_are_kept_or_flushed():
    """Loads, bits taken as halves, and vectors of them."""
    bits = np.arange(64, dtype=np.uint16) * 32 + np.uint16(0x8000) * (np.arange(64, dtype=np.uint16) % 2)
    h = bits.view(np.float16)
    flushed = np.where(bits & 0x7C00, h, np.float16(0)).astype(np.float32)
    for expression in ("float(h[i])", "float(as_type<half2>(uint(bits[i]) << 16).y)", "float(as_type<half>(bits[i]))"):
        inputs = {"h": h} if "h[i]" in expression else {"bits": bits.astype(np.uint32)}
        text = expression.replace("bits[i])", "ushort(bits[i]))") if "half>" in expression else expression
        np.testing.assert_array_equal(run(text, **inputs), h.astype(np.float32))
        np.testing.assert_array_equal(np.abs(run(text, "flush_half", **inputs)), np.abs(flushed))


def test_float_denormals_are_kept_or_flushed():
    tiny = np.arange(64, dtype=np.uint32).view(np.float32)
    np.testing.assert_array_equal(run("x[i] * 2.0", x=tiny), tiny * 2)
    np.testing.assert_array_equal(run("x[i] * 2.0", "flush_float", x=tiny), np.zeros(64))
    np.testing.assert_array_equal(run("x[i] * 2.0", x=tiny), tiny * 2)


def test_halves_are_rounded_after_each_operation():
    h, g = (RNG.standard_normal(64).astype(np.float16) for _ in range(2))
    found = run("float(h[i] * g[i] + h[i])", h=h, g=g)
    np.testing.assert_array_equal(found, (h * g + h).astype(np.float32))


@pytest.mark.parametrize("flag", compiler.FLAGS)
def test_a_sum_of_whole_numbers_does_not_depend_on_them(flag):
    made, expected = matvec(33, 256)
    np.testing.assert_array_equal(emulate(made, flags=(flag,))[0], expected)


def test_a_flag_that_there_is_not():
    with pytest.raises(AssertionError, match="no such flag: fast"):
        emulate(matvec(4, 128)[0], flags=("fast",))
