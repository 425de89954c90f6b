"""Which samples belong to each batch, as a function of the seed and the batch's number alone.

Samples of like length share a batch, so that little is padded; each pass takes the batches in another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bitnet_mlx.train.samples import Sample

_PAD = 32  # rows are as long as the longest sample, rounded up: few different shapes


class Batch(NamedTuple):
    """inputs, targets: int32 [B, L]. counts: float32 [B, L], 1 where the target is learned, 0 in prompts and padding."""

    inputs: np.ndarray
    targets: np.ndarray
    counts: np.ndarray

    @property
    def tokens(self) -> int:
        """Targets that are learned."""
        return int(self.counts.sum())


def batch(samples: Sequence[Sample]) -> Batch:
    """Rows side by side, padded with id 0."""
    longest = max(len(s.ids) for s in samples)
    width = -(-(longest - 1) // _PAD) * _PAD + 1
    ids = np.zeros((len(samples), width), np.int32)
    counts = np.zeros((len(samples), width), np.float32)
    for row, sample in enumerate(samples):
        ids[row, : len(sample.ids)] = sample.ids
        counts[row, max(1, sample.offset) : len(sample.ids)] = 1
    return Batch(ids[:, :-1], ids[:, 1:], counts[:, 1:])


@dataclass(frozen=True)
class Batches:
    """All batches of one pass, and the order in which passes take them. The last batch may be a smaller one."""

    groups: tuple[tuple[Sample, ...], ...]
    seed: int

    @classmethod
    def of(cls, samples: Sequence[Sample], size: int, seed: int) -> Batches:
        """size: samples a batch."""
        ordered = sorted(samples, key=lambda s: len(s.ids))
        return cls(tuple(tuple(ordered[at : at + size]) for at in range(0, len(ordered), size)), seed)

    def __len__(self) -> int:
        return len(self.groups)

    def position(self, index: int) -> dict[str, int]:
        """Which pass over the samples batch `index` belongs to, and its place in that pass."""
        epoch, place = divmod(index, len(self.groups))
        return {"epoch": epoch, "batch": place}

    def at(self, index: int) -> Batch:
        """Batch `index` of the run, counted from 0 over all passes."""
        epoch, place = divmod(index, len(self.groups))
        order = np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(len(self.groups))
        return batch(self.groups[int(order[place])])
