"""Spans: a pass through a model cut into parts that follow each other, so that they sum to the whole.

The only gaps are what a profiler itself does between two parts (`resume`, `toll`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

# In the order of a pass. "host" is what lies around a compiled step: Python, its checks and its bookkeeping.
PARTS = ("embedding", "norm", "qkv", "attention", "o", "gate_up", "down", "head", "sampling", "host")
LAYER_PARTS = ("norm", "qkv", "attention", "o", "gate_up", "down")


class Span(NamedTuple):
    """One part's stretch of time. layer: None outside of the layers. start, end: nanoseconds of one clock."""

    part: str
    layer: int | None
    start: int
    end: int

    @property
    def seconds(self) -> float:
        """How long it was."""
        return (self.end - self.start) * 1e-9


class Recorder:
    """Cuts time into spans: each `mark` ends the span that the mark before it (or `begin`) opened."""

    def __init__(self, clock: Callable[[], int] = time.perf_counter_ns) -> None:
        self.clock = clock
        self.spans: list[Span] = []
        self.toll = 0  # nanoseconds that ending a part costs by itself; taken off each span's beginning
        self._last = 0

    def begin(self) -> None:
        """A pass starts now; the spans of the one before are forgotten."""
        self.spans = []
        self._last = self.clock()

    def resume(self) -> None:
        """The time since the last mark was nobody's; the next part starts now."""
        self._last = self.clock()

    def mark(self, part: str, layer: int | None = None) -> None:
        """All time since the last mark was this part's."""
        self.mark_at(self.clock(), part, layer)

    def mark_at(self, when: int, part: str, layer: int | None = None) -> None:
        """The same, for a time of `clock` that was noted elsewhere."""
        self.spans.append(Span(part, layer, min(self._last + self.toll, when), when))
        self._last = when
