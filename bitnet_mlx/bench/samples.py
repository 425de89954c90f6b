"""Samples taken in turns, and how they spread."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Spread:
    """The 20th, 50th and 80th percentile of so many samples."""

    p20: float
    p50: float
    p80: float
    runs: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        low, middle, high = np.percentile(np.asarray(samples, np.float64), [20, 50, 80]).tolist()
        return cls(low, middle, high, len(samples))


def seconds(call: Callable[[], Any]) -> float:
    """How long one call takes. What it computes must be there when it returns."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def take_turns(contenders: Mapping[str, Callable[[], float]], repeats: int, warm: int = 1) -> dict[str, list[float]]:
    """What each contender returned, `repeats` times, one after another in each turn, after `warm` turns for nothing."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warm + repeats):
        for name, contender in contenders.items():
            value = contender()
            if turn >= warm:
                taken[name].append(value)
    return taken
