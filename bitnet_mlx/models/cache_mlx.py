"""The key-value cache of the MLX decoder, with the protocol of mlx-lm's caches, so that either can stand in for the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bitnet_mlx.backends.mlx_import import mx
from bitnet_mlx.errors import MemoryLimitError


class KVCache:
    """Keys and values of one layer: [B, num_key_value_heads, capacity, head_dim], of which `offset` positions are filled.

    The class's name and the layout of `state` are those of mlx_lm.models.cache.KVCache: a prompt cache that mlx-lm
    saves from this one loads there as its own.
    """

    step = 256  # positions of a growth

    def __init__(self, limit: int | None = None) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.offset = 0
        self.limit = limit

    def reserve(self, count: int) -> None:
        """Raise MemoryLimitError if `count` more positions would pass the limit."""
        if self.limit is not None and self.offset + count > self.limit:
            raise MemoryLimitError(
                f"[KVCache] {self.offset + count} positions are needed and {self.limit} are allowed; "
                "shorten the prompt, ask for fewer tokens, or raise --max-kv-size where the model allows it"
            )

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys and values [B, heads, L, D]; returns all that are filled, [B, heads, offset, D]."""
        count = keys.shape[2]
        self.reserve(count)
        end = self.offset + count
        held_keys, held_values = self._grown(self.keys, keys, end), self._grown(self.values, values, end)
        # In place: MLX writes into the array where nothing else holds it.
        held_keys[..., self.offset : end, :] = keys
        held_values[..., self.offset : end, :] = values
        self.keys, self.values, self.offset = held_keys, held_values, end
        return held_keys[..., :end, :], held_values[..., :end, :]

    def _grown(self, held: mx.array | None, new: mx.array, end: int) -> mx.array:
        """An array with room for `end` positions: `held` itself, or its filled part followed by zeros."""
        if held is not None and end <= held.shape[2]:
            return held
        capacity = -(-end // self.step) * self.step
        if self.limit is not None:
            capacity = min(capacity, self.limit)
        b, heads, _, dim = new.shape
        zeros = mx.zeros((b, heads, capacity - (0 if held is None else self.offset), dim), new.dtype)
        return zeros if held is None else mx.concatenate([held[..., : self.offset, :], zeros], axis=2)

    @property
    def state(self) -> tuple[mx.array | None, mx.array | None, int]:
        """(keys, values, offset): what mlx-lm evaluates, saves and restores."""
        return self.keys, self.values, self.offset

    @state.setter
    def state(self, value: Sequence[Any]) -> None:
        self.keys, self.values, self.offset = value

    @classmethod
    def from_state(cls, state: Sequence[Any]) -> KVCache:
        """A cache without a limit, from another's `state`."""
        cache = cls()
        cache.state = state
        return cache

    def is_trimmable(self) -> bool:
        return True

    def trim(self, n: int) -> int:
        """Forget the last n positions, or all if there are fewer; returns how many were forgotten."""
        n = min(self.offset, n)
        self.offset -= n
        return n

    def size(self) -> int:
        """Filled positions."""
        return self.offset

    def empty(self) -> bool:
        return self.keys is None

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return 0 if self.keys is None or self.values is None else self.keys.nbytes + self.values.nbytes

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str | None:
        """The mask for n new positions: None for one, "causal", or a boolean [n, offset + n] where True may be seen."""
        if window_size is None and (n == 1 or not return_array):
            return None if n == 1 else "causal"
        row = mx.arange(self.offset, self.offset + n)[:, None]
        column = mx.arange(self.offset + n)[None]
        mask = column <= row
        return mask if window_size is None else mask & (column > row - window_size)

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> Any:
        """mlx-lm's quantised cache with this one's contents. Imports mlx_lm."""
        from bitnet_mlx import _mlxlm

        quantized = _mlxlm.module("models.cache").QuantizedKVCache(group_size=group_size, bits=bits)
        quantized.offset = self.offset
        if self.keys is not None and self.values is not None:
            quantized.keys = mx.quantize(self.keys, group_size=group_size, bits=bits)
            quantized.values = mx.quantize(self.values, group_size=group_size, bits=bits)
        return quantized

    @staticmethod
    def merge(caches: Sequence[Any]) -> Any:
        """mlx-lm's batch cache over several sequences' caches, which its server asks for. Imports mlx_lm."""
        from bitnet_mlx import _mlxlm

        return _mlxlm.module("models.cache").BatchKVCache.merge(caches)


class SequenceCache(list):
    """The caches of all layers for one sequence: a list, as mlx-lm wants it, with what the Decoder protocol asks."""

    @property
    def offset(self) -> int:
        """Filled positions."""
        return self[0].offset

    def trim(self, offset: int) -> None:
        """Forget all positions from `offset` on."""
        for cache in self:
            cache.trim(max(cache.offset - offset, 0))

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(cache.nbytes for cache in self)
