"""Several sequences of different lengths in one pass of the MLX decoder: their tokens side by side, [1, T].

Everything but attention works token by token and sees T rows; attention takes each sequence's rows apart and sends them
to that sequence's own cache, so nothing is padded to the longest and no cache is copied when a sequence joins or leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bitnet_mlx.backends.mlx_import import mx
from bitnet_mlx.models.cache_mlx import SequenceCache
from bitnet_mlx.models.parts import Part

_FEW = 8  # rows up to which each number of them has its own compiled pass


class Ragged:
    """One layer's caches of the sequences of a pass, in the place of a single cache.

    positions: int32 [T], of each row in its sequence; rows behind those of all parts are padding.
    """

    def __init__(self, entries: Sequence[Any], lengths: Sequence[int], positions: np.ndarray) -> None:
        self.entries, self.lengths, self.positions = entries, lengths, positions
        self.offset = 0  # what a single cache would have filled; `positions` are what counts

    def attend(self, q: mx.array, kv: mx.array, one: Callable[..., mx.array]) -> mx.array:
        """q [1, heads, T, D] and kv [2, 1, kv heads, T, D] -> like q. one: attention of a single sequence (q, kv, cache,
        mask), which writes its cache."""
        outputs, at = [], 0
        for entry, length in zip(self.entries, self.lengths, strict=True):
            rows = slice(at, at + length)
            mask = None if length == 1 else "causal"
            outputs.append(one(q[:, :, rows], kv[:, :, :, rows], entry, mask))
            at += length
        if at < q.shape[2]:
            outputs.append(mx.zeros_like(q[:, :, at:]))
        return mx.concatenate(outputs, axis=2)


def rows(parts: Sequence[Part], caches: Sequence[SequenceCache], pad: bool) -> tuple[mx.array, list[Ragged]]:
    """(ids [1, T], the layers' caches) of a pass. pad: to one of few numbers of rows, for passes that are compiled."""
    ids = np.concatenate([np.asarray(part.ids, np.int32) for part in parts])
    offsets = [caches[part.sequence].offset for part in parts]
    positions = np.concatenate([np.arange(o, o + len(p.ids)) for o, p in zip(offsets, parts, strict=True)])
    if pad:
        empty = padded_rows(len(ids)) - len(ids)
        ids, positions = np.pad(ids, (0, empty)), np.pad(positions, (0, empty))
    lengths = [len(part.ids) for part in parts]
    layers = zip(*(caches[part.sequence] for part in parts), strict=True)
    return mx.array(ids)[None], [Ragged(entries, lengths, positions.astype(np.int32)) for entries in layers]


def padded_rows(count: int) -> int:
    """1 to 8, 12, 16, 24, 32, 48, 64, ...: at most half as many again."""
    if count <= _FEW:
        return count
    power = 1 << (count - 1).bit_length()
    return power if count > power * 3 // 4 else power * 3 // 4
