"""A timeline of bounded size: when it is full, every other sample goes and the distance between samples doubles."""

from __future__ import annotations

from bitnet_mlx.memory.records import Sample

CAPACITY = 4096


class Timeline:
    """Samples in order of time; `due` says when the next one is wanted."""

    def __init__(self, interval_s: float, capacity: int = CAPACITY) -> None:
        self.interval_s = interval_s
        self.samples: list[Sample] = []
        self._capacity = max(capacity, 2)
        self._next = 0.0

    def due(self, now: float) -> bool:
        """Whether the interval has passed."""
        return now >= self._next

    def add(self, sample: Sample) -> None:
        """Append, and thin out when full; the newest sample always stays."""
        self.samples.append(sample)
        self._next = sample.time_s + self.interval_s
        if len(self.samples) > self._capacity:
            self.samples = self.samples[-1::-2][::-1]
            self.interval_s *= 2
