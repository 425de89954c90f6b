"""Spans: a pass through a model cut into parts that follow each other, so that they sum to the whole.

The only gaps are what a profiler itself does between two parts (`resume`, `toll`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
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


_Note = tuple[int, "str | None", "int | None", int]  # when, the part that ended (None: nobody's), its layer, the toll


class Recorder:
    """Cuts time into spans: each `mark` ends the span that the mark before it (or `begin`) opened."""

    def __init__(self, clock: Callable[[], int] = time.perf_counter_ns) -> None:
        self.clock = clock
        self.toll = 0  # nanoseconds that ending a part costs by itself; taken off each span's beginning
        self._noted: list[_Note | Callable[[], Iterable[_Note]]] = []

    def begin(self) -> None:
        """A pass starts now; the spans of the one before are forgotten."""
        self._noted = [(self.clock(), None, None, 0)]

    def resume(self) -> None:
        """The time since the last mark was nobody's; the next part starts now."""
        self._noted.append((self.clock(), None, None, 0))

    def mark(self, part: str, layer: int | None = None) -> None:
        """All time since the last mark was this part's."""
        self.mark_at(self.clock(), part, layer)

    def mark_at(self, when: int, part: str, layer: int | None = None) -> None:
        """The same, for a time of `clock` that was noted elsewhere."""
        self._noted.append((when, part, layer, self.toll))

    def mark_later(self, notes: Callable[[], Iterable[_Note]]) -> None:
        """Marks that are worked out when the spans are asked for: not between two passes that are compared."""
        self._noted.append(notes)

    @property
    def spans(self) -> list[Span]:
        """The pass so far."""
        found: list[Span] = []
        last = 0
        for entry in self._noted:
            for when, part, layer, toll in entry() if callable(entry) else [entry]:
                if part is not None:
                    found.append(Span(part, layer, min(last + toll, when), when))
                last = when
        return found
