"""Least squares against all possibilities; GPTQ against its definition, column by column with explicit inverses."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from bitnet_mlx.calibration.gptq import DAMPING, compensated, factor, gptq, objective, refit
from bitnet_mlx.calibration.least_squares import codes, fit, spread, tensor
from bitnet_mlx.errors import ConfigError, FormatError
from bitnet_mlx.ternary import ternarize

RNG = np.random.default_rng(8)
ALL = np.array(list(itertools.product((-1, 0, 1), repeat=7)), np.float64)


def inputs(k: int, rows: int = 300, alike: float = 0.8) -> np.ndarray:
    """Correlated, of different sizes: float64 [rows, k]."""
    base = RNG.standard_normal((rows, max(2, k // 6)))
    return (alike * base @ RNG.standard_normal((base.shape[1], k)) + RNG.standard_normal((rows, k))) * RNG.uniform(
        0.2, 3, k
    )


@pytest.mark.parametrize("kind", ["normal", "laplace", "few"])
def test_least_squares_is_the_least_of_all(kind: str) -> None:
    for _ in range(40):
        w = {"normal": RNG.standard_normal(7), "laplace": RNG.laplace(size=7), "few": np.eye(7)[3] * 2 + 0.1}[kind]
        t, s = fit(w[None].astype(np.float32), "row")
        power = np.square(ALL).sum(1)
        best = np.square(w).sum() - (np.square(ALL @ w)[power > 0] / power[power > 0]).max()
        assert np.square(w - t[0] * s[0]).sum() == pytest.approx(best, abs=1e-5)


def test_scales_of_every_granularity() -> None:
    w = (RNG.standard_normal((9, 300)) * RNG.uniform(0.1, 2, (9, 1))).astype(np.float32)
    errors = []
    for granularity, shape in (("tensor", ()), ("row", (9,)), ("group", (9, 3))):
        t, s = fit(w, granularity)
        assert s.shape == shape and s.dtype == np.float32 and t.shape == w.shape
        whole = spread(s, w.shape)
        assert np.array_equal(t, np.clip(np.rint(w / whole), -1, 1))  # t is the best for s
        errors.append(np.square(w - t * whole).sum())
        if granularity != "tensor":
            for row in range(9):
                part = slice(128, 256) if granularity == "group" else slice(None)
                own = s[row, 1] if granularity == "group" else s[row]
                assert own == pytest.approx(
                    (w[row, part] @ t[row, part]) / np.square(t[row, part], dtype="f8").sum(), rel=1e-5
                )
        np.testing.assert_allclose(tensor((t, s)).rows(slice(None)), t * whole, rtol=1e-6)
    t, m = ternarize(w)
    assert errors[2] < errors[1] < errors[0] < np.square(w - t * m).sum()
    t, s = fit(np.zeros((2, 130), np.float32))
    assert not t.any() and (s > 0).all()
    with pytest.raises(ConfigError, match="per 'column'"):
        fit(w, "column")


def plain(w: np.ndarray, h: np.ndarray, granularity: str) -> tuple[np.ndarray, np.ndarray]:
    """GPTQ by its definition (optimal brain surgeon): after each column, the others move by the inverse of what is left."""
    n, k = w.shape
    w, h = w.copy(), h + DAMPING * np.diag(h).mean() * np.eye(k)
    t, scales = np.zeros((n, k)), []
    whole = fit(w, granularity)[1].astype(np.float64) if granularity != "group" else None
    for i in range(k):
        if i % 128 == 0:
            s = fit(w[:, i : i + 128], "row")[1].astype(np.float64) if whole is None else np.broadcast_to(whole, (n,))
            scales.append(s)
        t[:, i] = np.clip(np.rint(w[:, i] / scales[-1]), -1, 1)
        inverse = np.linalg.inv(h[i:, i:])
        w[:, i:] -= np.outer((w[:, i] - t[:, i] * scales[-1]) / inverse[0, 0], inverse[0])
    return t, np.stack(scales, 1) if whole is None else whole


@pytest.mark.parametrize(("k", "granularity"), [(72, "group"), (160, "group"), (160, "row"), (160, "tensor")])
def test_gptq_is_its_definition(k: int, granularity: str) -> None:
    w, x = RNG.standard_normal((11, k)), inputs(k)
    h = x.T @ x
    t, s = compensated(w, factor(h), granularity)
    wanted, scales = plain(w, h, granularity)
    assert np.array_equal(t, wanted) and len(np.unique(t)) == 3
    np.testing.assert_allclose(s, scales, rtol=1e-5)


@pytest.mark.parametrize("granularity", ["group", "row", "tensor"])
def test_outputs_are_never_worse(granularity: str) -> None:
    for case in range(6):
        w, x = RNG.standard_normal((12, 150)) * RNG.uniform(0.2, 2, (12, 1)), inputs(150, alike=case / 3)
        x[:, 5] = 0  # an input that is always 0
        x = x[:40] if case == 5 else x  # fewer rows than columns
        h = x.T @ x
        found = gptq(w, h, granularity)
        error = np.square(x @ (w - found[0] * spread(found[1], w.shape)).T).sum(axis=0)
        np.testing.assert_allclose(objective(w, h, found), error, rtol=1e-6)
        t, m = ternarize(w)
        absmean = np.square(x @ (w - t * float(m)).T).sum(axis=0)
        nearest = fit(w, granularity)
        least = np.square(x @ (w - nearest[0] * spread(nearest[1], w.shape)).T).sum(axis=0)
        if granularity == "tensor":
            assert error.sum() <= min(absmean.sum(), least.sum()) * (1 + 1e-6)
        else:
            assert (error <= np.minimum(absmean, least) * (1 + 1e-6)).all()
        if case in (2, 3):
            assert error.sum() < 0.7 * absmean.sum()


def test_scales_fitted_under_the_inputs_are_the_least() -> None:
    w, x = RNG.standard_normal((3, 200)), inputs(200)
    h = x.T @ x
    t, s = compensated(w, factor(h), "group")
    _, better = refit(w, h, t, s)
    base = objective(w, h, (t, better))
    assert (base <= objective(w, h, (t, s)) * (1 + 1e-9)).all()
    for row, group in itertools.product(range(3), range(2)):
        for times in (0.99, 1.01):
            moved = better.copy()
            moved[row, group] *= times
            assert objective(w, h, (t, moved))[row] > base[row]
    with pytest.raises(FormatError, match="not finite"):
        gptq(w, h * np.nan)


def test_halves_of_a_scale_go_to_0() -> None:
    assert codes(np.array([0.5, -0.5, 0.75, -1.5, 9]), np.float32(1)).tolist() == [0, 0, 1, -1, 1]


def test_inputs_of_nothing_leave_the_plain_fit() -> None:
    w, h = np.random.default_rng(0).standard_normal((3, 130)), np.zeros((130, 130))
    assert np.isfinite(factor(h)).all()
    t, scale = gptq(w, h, "group")
    assert np.isfinite(scale).all() and set(np.unique(t)) <= {-1, 0, 1}


def test_scales_that_no_positive_solution_replaces_stay() -> None:
    ones, old = np.ones((1, 256), np.int8), np.array([[0.5, 0.25]], np.float32)
    # Two groups that always see the same cannot be told apart; and weights against their codes want a negative scale.
    for w, h in ((np.ones((1, 256)), np.ones((256, 256))), (-np.ones((1, 256)), np.eye(256))):
        assert np.array_equal(refit(w, h, ones, old)[1], old)
