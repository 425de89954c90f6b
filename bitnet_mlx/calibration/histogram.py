"""A histogram of streamed values, in bounded memory, whose parts can be merged: the order of values changes no count.

Bins are 2^exponent / HALF wide, from -2^exponent to 2^exponent, with 2^exponent the least power of two above every |x|. A
larger value doubles the range and adds bins up in pairs, so the counts are those of one pass with the last range, exactly.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bitnet_mlx.errors import FormatError

HALF = 4096  # bins on either side of 0
LEAST, MOST = -60, 128  # exponents that a range may have; values nearer to 0 than 2^-60 / HALF share a bin


class Histogram:
    """counts: int64 [2 HALF], bin i holds (i - HALF) w <= x < (i + 1 - HALF) w with w = 2^exponent / HALF.

    count, zeros (values that are 0), low and high are exact; total and squares, sums of x and x^2, are float64.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(2 * HALF, np.int64)
        self.exponent = LEAST
        self.count = self.zeros = 0
        self.low, self.high = np.inf, -np.inf
        self.total = self.squares = 0.0

    @property
    def width(self) -> float:
        """Of a bin."""
        return 2.0**self.exponent / HALF

    @property
    def absmax(self) -> float:
        """The largest |x|, exactly; 0 where nothing was added."""
        return float(max(-self.low, self.high)) if self.count else 0.0

    def add(self, x: np.ndarray) -> None:
        """Count float values of any shape. Raises FormatError for NaN or infinity."""
        x = np.asarray(x, np.float32).reshape(-1)
        if not x.size:
            return
        low, high = float(x.min()), float(x.max())
        if not np.isfinite([low, high]).all():
            raise FormatError("[histogram] an activation is NaN or infinite; the model or the text is damaged")
        top = max(-low, high)
        self._widen(max(LEAST, int(np.frexp(top)[1])) if top else LEAST)
        self.low, self.high = min(self.low, low), max(self.high, high)
        # A power of two: the product is exact, and so is the bin.
        scaled = np.floor(x * np.float64(HALF / 2.0**self.exponent)).astype(np.int64)
        self.counts += np.bincount(scaled + HALF, minlength=2 * HALF)
        self.count += x.size
        self.zeros += int(x.size - np.count_nonzero(x))
        self.total += float(x.sum(dtype=np.float64))
        self.squares += float(np.square(x, dtype=np.float64).sum())

    def merge(self, other: Histogram) -> None:
        """Add what another has counted; it stays as it is."""
        exponent = max(self.exponent, other.exponent)
        self._widen(exponent)
        self.counts += _halved(other.counts, exponent - other.exponent)
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.count, self.zeros = self.count + other.count, self.zeros + other.zeros
        self.total, self.squares = self.total + other.total, self.squares + other.squares

    def magnitudes(self) -> np.ndarray:
        """int64 [HALF]: how many |x| above 0 lie in each bin of `width`, from 0 up; values that are 0 are left out."""
        folded = self.counts[HALF:] + self.counts[HALF - 1 :: -1]
        folded[0] -= self.zeros
        return folded

    def above(self, clip: float) -> float:
        """The share of values with |x| > clip, within the one bin that the clip lies in."""
        at = int(clip / self.width)
        if clip >= self.absmax or at >= HALF:
            return 0.0
        counts = self.magnitudes()
        inside = float(counts[:at].sum()) + float(counts[at]) * (clip / self.width - at)
        return max(0.0, 1 - (self.zeros + inside) / self.count)

    def _widen(self, exponent: int) -> None:
        if exponent > self.exponent:
            self.counts = _halved(self.counts, exponent - self.exponent)
            self.exponent = exponent

    def record(self) -> dict[str, Any]:
        """All of it for JSON; `read` is the inverse. counts: from bin `first` to the last that is not empty."""
        used = np.flatnonzero(self.counts)
        first, last = (int(used[0]), int(used[-1])) if used.size else (HALF, HALF - 1)
        return {
            "count": self.count, "zeros": self.zeros, "min": self.low if self.count else None,
            "max": self.high if self.count else None, "sum": self.total, "sum_of_squares": self.squares,
            "exponent": self.exponent, "bins": 2 * HALF, "first": first, "counts": self.counts[first : last + 1].tolist(),
        }  # fmt: skip

    @classmethod
    def read(cls, record: dict[str, Any]) -> Histogram:
        """From `record`. Raises FormatError where it is none."""
        made = cls()
        try:
            first, counts = int(record["first"]), np.asarray(record["counts"], np.int64)
            made.exponent, made.count, made.zeros = (int(record[k]) for k in ("exponent", "count", "zeros"))
            made.counts[first : first + len(counts)] = counts
            if made.count:
                made.low, made.high = float(record["min"]), float(record["max"])
            made.total, made.squares = float(record["sum"]), float(record["sum_of_squares"])
            sound = record["bins"] == 2 * HALF and made.counts.sum() == made.count and LEAST <= made.exponent <= MOST
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"[histogram] the record is damaged ({error!r}); make it again with calibrate") from error
        if not sound:
            raise FormatError("[histogram] bins or counts of the record do not fit; make it again with calibrate")
        return made


def _halved(counts: np.ndarray, times: int) -> np.ndarray:
    """The same values in a range of 2^times the size."""
    for _ in range(times):
        wider = np.zeros_like(counts)
        wider[HALF // 2 : HALF // 2 + HALF] = counts.reshape(-1, 2).sum(axis=1)
        counts = wider
    return counts
