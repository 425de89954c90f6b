"""Where to clip activations, from their histogram: the largest |x| that an int8 code is to stand for.

absmax      the largest |x|: nothing is clipped.
percentile  the |x| that so many percent of values do not pass.
mse         the clip c with the least mean of (x - Q(x))^2, Q rounding to multiples of c / 127 and clipping to c.
kl          the clip with the least KL(P || Q): P the values up to c, what lies beyond in its last bin; Q the same in 128
            levels, each level's mass spread over its bins that are not empty (NVIDIA's 8-bit calibration, 2017).

Values that are 0 are 0 in every code and are left out of mse and kl.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bitnet_mlx.calibration.histogram import HALF, Histogram
from bitnet_mlx.errors import ConfigError

METHODS = ("absmax", "percentile", "mse", "kl")
PERCENTILE = 99.9
_LEVELS = 128  # magnitudes of an int8 code, 0 too
_POINTS = 2  # of a bin, where `mse` looks at it
_STEP = HALF // 128  # bins between two candidates


def check_percentile(percentile: float) -> None:
    """Raises ConfigError for one outside of 50 to 100."""
    if not 50 <= percentile <= 100:
        raise ConfigError(f"[calibrate] --percentile is {percentile:g}; 50 to 100 is allowed")


def clip_points(histogram: Histogram, percentile: float = PERCENTILE) -> dict[str, float]:
    """A clip by each of METHODS; 0 where all values are 0. See check_percentile."""
    check_percentile(percentile)
    if histogram.absmax == 0:
        return dict.fromkeys(METHODS, 0.0)
    found = {
        "absmax": histogram.absmax,
        "percentile": _percentile(histogram, percentile),
        "mse": _best(histogram, _mse),
        "kl": _best(histogram, _kl),
    }
    return {name: min(clip, histogram.absmax) for name, clip in found.items()}


def _percentile(histogram: Histogram, percent: float) -> float:
    """Within a bin of np.percentile(|x|, percent)."""
    counts = histogram.magnitudes()
    reached = np.cumsum(counts) + histogram.zeros
    wanted = percent / 100 * histogram.count
    if wanted <= histogram.zeros:
        return 0.0
    at = int(np.searchsorted(reached, wanted))
    before = reached[at] - counts[at]
    return histogram.width * (at + float(wanted - before) / max(int(counts[at]), 1))


def _best(histogram: Histogram, cost: Callable[[np.ndarray, int], float]) -> float:
    """The candidate, in bins, whose cost is least; of equals the largest."""
    counts = histogram.magnitudes()
    used = int(np.flatnonzero(counts)[-1]) + 1
    candidates = [*range(_LEVELS, used, _STEP), max(used, _LEVELS)]
    costs = np.array([cost(counts, bins) for bins in candidates])
    return histogram.width * candidates[len(costs) - 1 - int(np.argmin(costs[::-1]))]


def _mse(counts: np.ndarray, clip: int) -> float:
    """Sum of squared errors in units of a bin, the values of a bin at a few points of it."""
    there = np.flatnonzero(counts)
    points = there[:, None] + (np.arange(_POINTS) + 0.5) / _POINTS
    step = clip / (_LEVELS - 1)
    kept = np.minimum(np.rint(points / step), _LEVELS - 1) * step
    return float((counts[there] * np.square(points - kept).mean(axis=1)).sum())


def _kl(counts: np.ndarray, clip: int) -> float:
    p = counts[:clip].astype(np.float64)
    level = np.arange(clip) * _LEVELS // clip
    mass = np.bincount(level, p, _LEVELS)
    filled = np.bincount(level, p > 0, _LEVELS)
    q = np.where(p > 0, (mass / np.maximum(filled, 1))[level], 0.0)
    p[-1] += float(counts[clip:].sum())
    # What was clipped lies where Q has no mass of its own when the last bin was empty: the smallest there is.
    p, q = p / p.sum(), q / max(q.sum(), 1e-300)
    there = p > 0
    return float((p[there] * np.log(p[there] / np.maximum(q[there], 1e-9))).sum())
