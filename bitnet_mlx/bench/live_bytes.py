"""Bytes that a run holds and what a call needs on top, by the allocators' own counts: Python's and MLX's.

tracemalloc counts Python objects and numpy arrays to the byte; MLX counts its arrays. No clock is involved.
"""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from bitnet_mlx.backends import ON_MLX


class Meter:
    """Counts for one backend, while `counting` is entered."""

    def __init__(self, backend: str) -> None:
        self._on_mlx = backend in ON_MLX

    @contextmanager
    def counting(self) -> Iterator[Meter]:
        """Counting costs time: nothing is timed inside."""
        ours = not tracemalloc.is_tracing()
        gc.collect()
        gc.freeze()  # what is there already need not be looked through at each count
        if ours:
            tracemalloc.start()
        try:
            yield self
        finally:
            gc.unfreeze()
            if ours:
                tracemalloc.stop()

    def live(self) -> int:
        """Bytes that are held now, since counting began."""
        gc.collect()
        return tracemalloc.get_traced_memory()[0] + self._mlx("get_active_memory")

    def transient(self, call: Callable[[], Any]) -> int:
        """Bytes that a call held at most, beyond those that were there before it."""
        gc.collect()
        before = tracemalloc.get_traced_memory()[0], self._mlx("get_active_memory")
        tracemalloc.reset_peak()
        self._mlx("reset_peak_memory")
        call()
        peaks = tracemalloc.get_traced_memory()[1], self._mlx("get_peak_memory")
        return sum(max(0, peak - held) for peak, held in zip(peaks, before, strict=True))

    def _mlx(self, name: str) -> int:
        if not self._on_mlx:
            return 0
        import mlx.core as mx

        return getattr(mx, name)() or 0
