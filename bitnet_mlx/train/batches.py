"""Which samples belong to each batch, as a function of the seed and the batch's number alone.

Samples of like length share a batch, so that little is padded; each pass takes the batches in another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bitnet_mlx.train.packed import rows_of
from bitnet_mlx.train.samples import Sample

Row = tuple[Sample, ...]
_PAD = 32  # rows are as long as the longest, rounded up: few different shapes


class Batch(NamedTuple):
    """inputs, targets: int32 [B, L]. counts: float32 [B, L], 1 where the target is learned, 0 in prompts and padding.

    places, positions: int32 [B, L], see SideBySide.
    """

    inputs: np.ndarray
    targets: np.ndarray
    counts: np.ndarray
    places: np.ndarray
    positions: np.ndarray

    @property
    def tokens(self) -> int:
        """Targets that are learned."""
        return int(self.counts.sum())

    @property
    def packed(self) -> bool:
        """Whether some row holds several samples."""
        return bool((self.places > 0).any())


def batch(rows: Sequence[Row]) -> Batch:
    """Rows under one another, each of one or several samples, padded with id 0."""
    longest = max(sum(len(s.ids) - 1 for s in row) for row in rows)
    shape = len(rows), -(-longest // _PAD) * _PAD
    inputs, targets, positions = (np.zeros(shape, np.int32) for _ in range(3))
    counts, places = np.zeros(shape, np.float32), np.full(shape, -1, np.int32)
    for r, row in enumerate(rows):
        at = 0
        for place, sample in enumerate(row):
            here = slice(at, at := at + len(sample.ids) - 1)
            inputs[r, here], targets[r, here] = sample.ids[:-1], sample.ids[1:]
            counts[r, here] = np.arange(1, len(sample.ids)) >= sample.offset
            places[r, here], positions[r, here] = place, np.arange(len(sample.ids) - 1)
    return Batch(inputs, targets, counts, places, positions)


@dataclass(frozen=True)
class Batches:
    """All batches of one pass, and the order in which passes take them. The last batch may be a smaller one."""

    groups: tuple[tuple[Row, ...], ...]
    seed: int

    @classmethod
    def of(cls, samples: Sequence[Sample], size: int, seed: int, width: int = 0) -> Batches:
        """size: rows a batch. width: inputs of a row that holds as many samples as fit; 0: a row for each sample."""
        ordered = rows_of(samples, width) if width else [(s,) for s in sorted(samples, key=lambda s: len(s.ids))]
        return cls(tuple(tuple(ordered[at : at + size]) for at in range(0, len(ordered), size)), seed)

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def rows(self) -> int:
        """Rows of one pass."""
        return sum(map(len, self.groups))

    def position(self, index: int) -> dict[str, int]:
        """Which pass over the samples batch `index` belongs to, and its place in that pass."""
        epoch, place = divmod(index, len(self.groups))
        return {"epoch": epoch, "batch": place}

    def at(self, index: int) -> Batch:
        """Batch `index` of the run, counted from 0 over all passes."""
        epoch, place = divmod(index, len(self.groups))
        order = np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(len(self.groups))
        return batch(self.groups[int(order[place])])
