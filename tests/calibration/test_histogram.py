"""Histograms of streams against numpy's of the whole, and clip points against plain definitions on planted values."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from bitnet_mlx.calibration.clips import METHODS, clip_points
from bitnet_mlx.calibration.histogram import HALF, Histogram
from bitnet_mlx.errors import ConfigError, FormatError

RNG = np.random.default_rng(5)
NORMAL = RNG.standard_normal(60_000)
PLANTED = {
    "normal": NORMAL,
    "laplace": RNG.laplace(0, 0.3, 60_000),
    "uniform": RNG.uniform(-3, 3, 60_000),
    "outliers": np.concatenate([NORMAL, [15.5, -15.9, 15.9]]),
    "half zeros": np.maximum(NORMAL, 0) ** 2,
    "tiny": NORMAL * 1e-7,
}
PLANTED = {name: x.astype(np.float32) for name, x in PLANTED.items()}


def histogram(*parts: np.ndarray) -> Histogram:
    made = Histogram()
    for part in parts:
        made.add(part)
    return made


def same(a: Histogram, b: Histogram) -> bool:
    exact = ("exponent", "count", "zeros", "low", "high")
    close = all(math.isclose(getattr(a, n), getattr(b, n), rel_tol=1e-9, abs_tol=1e-9) for n in ("total", "squares"))
    return np.array_equal(a.counts, b.counts) and all(getattr(a, n) == getattr(b, n) for n in exact) and close


@pytest.mark.parametrize("name", PLANTED)
def test_counts_are_numpys(name: str) -> None:
    x = PLANTED[name]
    made = histogram(x.reshape(-1, 3))
    top = 2.0 ** math.floor(math.log2(np.abs(x).max()) + 1)
    counts, _ = np.histogram(x.astype(np.float64), np.arange(-HALF, HALF + 1) * (top / HALF))
    assert np.array_equal(made.counts, counts) and made.width == top / HALF
    assert (made.low, made.high, made.zeros) == (x.min(), x.max(), (x == 0).sum())
    assert made.total == pytest.approx(x.sum(dtype=np.float64)) and made.squares == pytest.approx(
        np.square(x, dtype="f8").sum()
    )
    assert made.magnitudes().sum() == np.count_nonzero(x)
    assert made.above(0.4 * made.absmax) == pytest.approx((np.abs(x) > 0.4 * made.absmax).mean(), abs=2e-3)


def test_order_and_merging_change_nothing() -> None:
    x = PLANTED["outliers"] * np.geomspace(1e-4, 30, len(PLANTED["outliers"])).astype(np.float32)
    whole = histogram(x)
    assert same(whole, histogram(*np.array_split(x[::-1], 7)))
    left, right = histogram(x[:100]), histogram(x[100:])
    assert left.exponent < right.exponent
    left.merge(right)
    assert same(whole, left)
    right.merge(histogram(x[:100]))
    assert same(whole, right)
    empty = Histogram()
    empty.merge(whole)
    assert same(whole, empty)
    assert same(whole, Histogram.read(json.loads(json.dumps(whole.record()))))


def test_what_is_no_range_is_refused() -> None:
    for bad in (np.nan, np.inf):
        with pytest.raises(FormatError, match="NaN or infinite"):
            Histogram().add(np.array([1, bad], np.float32))
    record = histogram(NORMAL).record()
    for change in ({"count": 3}, {"counts": None}, {"first": 2 * HALF}):
        with pytest.raises(FormatError, match="make it again"):
            Histogram.read(record | change)
    with pytest.raises(ConfigError, match="--percentile is 40"):
        clip_points(histogram(NORMAL), 40)
    zeros = histogram(np.zeros(9, np.float32))
    assert zeros.zeros == 9 and clip_points(zeros) == dict.fromkeys(METHODS, 0.0)


@pytest.mark.parametrize("name", PLANTED)
def test_absmax_and_percentile(name: str) -> None:
    x = PLANTED[name]
    made = histogram(x)
    for percent in (60, 99, 99.9):
        clips = clip_points(made, percent)
        assert clips["absmax"] == np.abs(x).max()
        low, high = np.percentile(np.abs(x), [percent - 0.01, percent + 0.01])  # a rank or two: tails are sparse
        assert low - made.width <= clips["percentile"] <= high + made.width


def mse(x: np.ndarray, clip: float) -> float:
    step = clip / 127
    return float(np.square(x - np.clip(np.rint(x / step), -127, 127) * step).mean())


@pytest.mark.parametrize("name", PLANTED)
def test_mse_is_the_least(name: str) -> None:
    x = PLANTED[name].astype(np.float64)
    clips = clip_points(histogram(x))
    best = min(mse(x, c) for c in np.linspace(0.05, 1, 96) * np.abs(x).max())
    assert mse(x, clips["mse"]) <= 1.01 * best


def test_mse_leaves_lone_outliers_out_where_that_pays() -> None:
    x = np.concatenate([np.tile(NORMAL, 9), [15.5]])
    clips = clip_points(histogram(x))
    assert clips["mse"] < 8 and mse(x, clips["mse"]) < 0.5 * mse(x, 15.5)


def divergence(p: list[float], bins: int) -> float:
    """KL of the values up to bin `bins` from the same in 128 levels, written out value by value."""
    kept = [float(v) for v in p[:bins]]
    levels: list[list[int]] = [[] for _ in range(128)]
    for i in range(bins):
        levels[i * 128 // bins].append(i)
    q = [0.0] * bins
    for level in levels:
        filled = [i for i in level if kept[i] > 0]
        for i in filled:
            q[i] = sum(kept[j] for j in level) / len(filled)
    kept[-1] += sum(p[bins:])
    total, other = sum(kept), sum(q)
    return sum(v / total * math.log(v / total / max(w / other, 1e-9)) for v, w in zip(kept, q, strict=True) if v > 0)


@pytest.mark.parametrize("name", ["normal", "laplace", "outliers"])
def test_kl_is_the_least(name: str) -> None:
    x = PLANTED[name]
    made = histogram(x)
    counts, _ = np.histogram(np.abs(x), np.arange(HALF + 1) * made.width)
    used = int(np.flatnonzero(counts)[-1]) + 1
    chosen = round(clip_points(made)["kl"] / made.width)
    candidates = {min(chosen, used), *range(128, used, 256), used}
    costs = {bins: divergence(counts.tolist(), bins) for bins in candidates}
    assert costs[min(chosen, used)] <= min(costs.values()) + 1e-9
    if name == "outliers":
        assert clip_points(made)["kl"] < 8


def test_a_clip_is_never_above_the_largest_value() -> None:
    for values in ([1.0, -3.0, 2.0], [3.0] * 4):
        histogram = Histogram()
        histogram.add(np.array(values, np.float32))
        found = clip_points(histogram, 100)
        assert found["absmax"] == 3.0 and all(0 < clip <= 3.0 for clip in found.values())
    for percentile in (49.9, 100.1):
        with pytest.raises(ConfigError, match="50 to 100 is allowed"):
            clip_points(histogram, percentile)
