"""Several short samples in one row, each as if it were alone: attention stays inside a sample, and positions begin anew.

A model's layers take it as a cache: it holds nothing, and says where each token stands and what it may look at.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from bitnet_mlx.train.samples import Sample


def rows_of(samples: Sequence[Sample], width: int) -> list[tuple[Sample, ...]]:
    """Samples put together, longest first, each into the fullest row that has room; a row's inputs are at most `width`.

    A sample of n ids has n - 1 inputs. The fullest rows come first. The same samples give the same rows.
    """
    rows: list[list[Sample]] = []
    rooms: list[tuple[int, int]] = []  # (inputs left, row), sorted
    for sample in sorted(samples, key=lambda s: -len(s.ids)):
        need = len(sample.ids) - 1
        at = bisect_left(rooms, (need, 0))
        if at < len(rooms):
            room, row = rooms.pop(at)
            rows[row].append(sample)
        else:
            room, row = width, len(rows)
            rows.append([sample])
        insort(rooms, (room - need, row))
    return [tuple(rows[row]) for _, row in sorted(rooms)]


class SideBySide:
    """What a layer needs to know of a batch. places: int32 [B, L], which sample of its row each input belongs to, -1 for
    padding. positions: int32 [B, L], its place in that sample."""

    offset = 0

    def __init__(self, places: np.ndarray, positions: np.ndarray) -> None:
        self.positions = positions
        # Padding looks at padding, so that no row of attention is empty.
        length = places.shape[1]
        own = places[:, :, None] == places[:, None, :]
        self._mask = mx.array((own & np.tri(length, dtype=bool))[:, None])

    def make_mask(self, _length: int, **_: Any) -> mx.array:
        """bool [B, 1, L, L]."""
        return self._mask

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """The same: there is nothing before them."""
        return keys, values
