"""The mat-vec on activations in floating point: exact on whole numbers, else within its stated tolerance."""

from __future__ import annotations

import numpy as np
import pytest

from bitnet_mlx.backends.kernels.launch import Launch
from bitnet_mlx.backends.kernels.matvec import MatvecVariant, float_matvec
from bitnet_mlx.errors import ConfigError
from bitnet_mlx.formats import words2
from tests.backend import shapes
from tests.emulator import emulate
from tests.kernels.products import DTYPES, Product, product

# (rows, M, kind of scale): every rows, the smallest and the largest M, every kind.
FORMS = [(4, 1, "row"), (4, 3, "group"), (2, 8, "tensor"), (8, 2, "group"), (1, 5, "row")]


def launch_of(case: Product, x: np.ndarray, rows: int, dtype: str) -> Launch:
    return float_matvec(
        x, case.words, case.scale, case.bias, case.residual, variant=MatvecVariant(rows, 2), dtype=dtype
    )


def check(found: np.ndarray, case: Product, x: np.ndarray, label: str) -> None:
    """found lies between the roundings of the exact result less and more the tolerance."""
    n, k = case.t.shape
    scale = np.repeat(case.scale, 128, axis=1)[:, :k] if case.scale.ndim == 2 else np.reshape(case.scale, (-1, 1))
    weight = case.t * scale.astype(np.float64)
    wide = x.astype(np.float64)
    slack = k * 2.0**-24 * (np.abs(wide) @ np.broadcast_to(np.abs(scale), (n, k)).T)
    exact = wide @ weight.T
    for added in (case.bias, case.residual):
        if added is not None:
            exact = exact + added.astype(np.float64)
            slack += 2.0**-23 * (np.abs(exact) + np.abs(added.astype(np.float64)))
    if case.residual is not None and found.dtype != np.float32:
        slack += float(np.finfo(np.float16).eps if found.dtype == np.float16 else 2.0**-7) * np.abs(
            exact - case.residual
        )
    low, high = ((exact + s).astype(found.dtype).astype(np.float64) for s in (-slack, slack))
    value = found.astype(np.float64)
    assert ((low <= value) & (value <= high)).all(), f"{label}: {np.abs(value - exact).max()} beyond {slack.max()}"


@pytest.mark.parametrize(("rows", "m", "scale"), FORMS)
@pytest.mark.parametrize("k", shapes.K)
def test_whole_numbers_are_exact_and_others_within_tolerance(rows: int, m: int, scale: str, k: int) -> None:
    for n in (1, 33, 129):
        case = product(m, n, k, scale=scale, plain=True)
        found = emulate(launch_of(case, case.q.astype(np.float32), rows, "float32"))[0]
        shapes.same(found, case.y, f"whole numbers, M {m}, N {n}, K {k}")
        case = product(m, n, k, scale=scale)
        x = np.random.default_rng(k).standard_normal((m, k)).astype(np.float32)
        check(emulate(launch_of(case, x, rows, "float32"), seed=n)[0], case, x, f"M {m}, N {n}, K {k}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("more", [False, True])
def test_other_dtypes_bias_and_residual(dtype: str, more: bool) -> None:
    for n, k in ((33, 100), (2, 3), (33, 640)):  # 2 x 3 activations lie in the constant address space
        case = product(2, n, k, scale="row", bias=more, residual=more, dtype=dtype)
        x = np.random.default_rng(k).standard_normal((2, k)).astype(DTYPES[dtype])
        check(emulate(launch_of(case, x, 4, dtype))[0], case, x, f"{dtype}, N {n}, K {k}")


@pytest.mark.parametrize("words", [1, 2, 4])
def test_any_number_of_words_a_load(words: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitnet_mlx.backends.kernels import matvec
    from bitnet_mlx.backends.kernels.layout import Layout

    monkeypatch.setattr(matvec, "halves", lambda k: Layout("halves", words))
    for scale in ("row", "group"):
        case = product(2, 9, 2570, scale=scale, plain=True)
        shapes.same(emulate(launch_of(case, case.q.astype(np.float32), 4, "float32"))[0], case.y, scale)


@pytest.mark.parametrize("flags", [("fast_math", "flush_half"), ("split_fma",), ("contract",)])
def test_whatever_the_compiler_and_the_chip_do(flags: tuple[str, ...]) -> None:
    case = product(2, 9, 2570, scale="row", plain=True)
    shapes.same(emulate(launch_of(case, case.q.astype(np.float32), 4, "float32"), flags=flags)[0], case.y, str(flags))
    x = np.random.default_rng(1).standard_normal((2, 2570)).astype(np.float32)
    check(emulate(launch_of(case, x, 4, "float32"), flags=flags)[0], case, x, str(flags))


def test_nine_rows_are_refused() -> None:
    x, words = np.zeros((9, 128), np.float32), words2.pack(np.zeros((4, 128), np.int8))
    with pytest.raises(ConfigError, match="9 rows"):
        float_matvec(x, words, np.ones(1, np.float32), variant=MatvecVariant(), dtype="float32")
