"""The key-value cache of the numpy and cpu decoders: float32, one array a layer, grown by doubling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitnet_mlx.errors import MemoryLimitError
from bitnet_mlx.models.config import DecoderConfig

_FIRST = 64  # positions of the first allocation


STEP = 256  # positions of the MLX cache's smallest array


def capacity(positions: int, limit: int | None = None) -> int:
    """Positions of the MLX cache's array that holds so many: 256, 512, 768, 1024, 1536, 2048, 3072, ... or the limit.

    By a third to a half each time, since a compiled step is traced anew for each size.
    """
    room = STEP
    while room < positions:
        room += max(STEP, 1 << room.bit_length() - 2)
    return room if limit is None else min(room, limit)


@dataclass(frozen=True)
class Excerpt:
    """A copy of some consecutive positions of a sequence's cache, whatever made it. nbytes: of its arrays."""

    parts: Any
    positions: int
    nbytes: int


class KVCache:
    """Keys and values of one sequence. keys[layer], values[layer]: float32 [num_key_value_heads, capacity, head_dim].

    A head's positions lie in one run, which is what attention reads. `offset` is how many positions are filled.
    """

    def __init__(self, config: DecoderConfig, capacity: int = _FIRST, limit: int | None = None) -> None:
        self.limit = limit if limit is not None else config.max_position_embeddings
        self.offset = 0
        self._shape = (config.num_key_value_heads, config.head_dim)
        self._layers = config.num_hidden_layers
        self.keys: list[np.ndarray] = []
        self.values: list[np.ndarray] = []
        self.capacity = 0
        self._row: np.ndarray | None = None
        self._grow(min(max(capacity, 1), self.limit))

    def _grow(self, capacity: int) -> None:
        heads, dim = self._shape
        for arrays in (self.keys, self.values):
            for layer in range(self._layers):  # one after another, so that one layer alone is held twice
                new = np.zeros((heads, capacity, dim), np.float32)
                if layer < len(arrays):
                    new[:, : self.offset] = arrays[layer][:, : self.offset]
                    arrays[layer] = new
                else:
                    arrays.append(new)
        self.capacity, self._row = capacity, None

    def __getstate__(self) -> dict[str, Any]:
        """A copy's arrays lie elsewhere."""
        return {**self.__dict__, "_row": None}

    @property
    def row(self) -> np.ndarray:
        """int64: the capacity, then the addresses of keys and of values of each layer, as the compiled step reads them. Kept
        as long as the arrays, since asking numpy for all of them takes as long as a small model's step."""
        if self._row is None:
            pairs = zip(self.keys, self.values, strict=True)
            self._row = np.array([self.capacity, *(array.ctypes.data for pair in pairs for array in pair)], np.int64)
        return self._row

    def reserve(self, count: int) -> None:
        """Make room for `count` more positions. Raises MemoryLimitError past the context's limit."""
        needed = self.offset + count
        if needed > self.limit:
            raise MemoryLimitError(
                f"[KVCache] {needed} positions are needed and {self.limit} are allowed; "
                "shorten the prompt, ask for fewer tokens, or raise --max-kv-size where the model allows it"
            )
        if needed > self.capacity:
            self._grow(min(self.limit, max(needed, 2 * self.capacity)))

    def trim(self, offset: int) -> None:
        """Forget all positions from `offset` on."""
        self.offset = min(self.offset, offset)

    def copy(self, start: int, end: int) -> Excerpt:
        """Filled positions from `start` up to `end`, float32 [2, layers, num_key_value_heads, end - start, head_dim]."""
        heads, dim = self._shape
        data = np.empty((2, self._layers, heads, end - start, dim), np.float32)
        for side, arrays in zip(data, (self.keys, self.values), strict=True):
            for layer, array in enumerate(arrays):
                side[layer] = array[:, start:end]
        return Excerpt(data, end - start, data.nbytes)

    def extend(self, excerpts: Sequence[Excerpt]) -> None:
        """Put copies of the positions that follow behind the filled ones. Raises MemoryLimitError past the limit."""
        self.reserve(sum(excerpt.positions for excerpt in excerpts))
        for excerpt in excerpts:
            end = self.offset + excerpt.positions
            for side, arrays in zip(excerpt.parts, (self.keys, self.values), strict=True):
                for layer, array in enumerate(arrays):
                    array[:, self.offset : end] = side[layer]
            self.offset = end

    def shrink(self) -> int:
        """Give back the room behind the filled positions; returns the bytes freed. The next token makes room again."""
        before = self.nbytes
        if self.capacity > max(self.offset, 1):
            self._grow(max(self.offset, 1))
        return before - self.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(a.nbytes for a in self.keys) + sum(a.nbytes for a in self.values)
