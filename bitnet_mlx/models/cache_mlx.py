"""The key-value cache of the MLX decoder, with the protocol of mlx-lm's caches, so that either can stand in for the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bitnet_mlx.backends.attention_mlx import RECENT
from bitnet_mlx.backends.mlx_import import mx
from bitnet_mlx.errors import MemoryLimitError
from bitnet_mlx.models.cache import Excerpt, capacity


class KVCache:
    """Keys and values of one layer in one array `kv` [2, B, num_key_value_heads, capacity, head_dim], keys first.

    One array means one write a step. A compiled step cannot write in place: it takes the last positions in a small array
    of their own, `recent` [2, B, num_key_value_heads, RECENT, head_dim], and gives it back with one more; when that is
    full, or anything else asks, they move into `kv`. The class's name and the layout of `state` are those of
    mlx_lm.models.cache.KVCache: a prompt cache that mlx-lm saves from this one loads there as its own.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.kv: mx.array | None = None
        self.recent: mx.array | None = None
        self.limit = limit
        self._past = self._late = 0  # positions filled in kv and in recent

    @property
    def offset(self) -> int:
        """Filled positions."""
        return self._past + self._late

    @property
    def lengths(self) -> tuple[int, int]:
        """Filled positions of `kv` and of `recent`."""
        return self._past, self._late

    @property
    def room(self) -> int:
        """Positions that `kv` has room for, or will have."""
        return capacity(1) if self.kv is None else self.kv.shape[3]

    @property
    def arrays(self) -> list[mx.array]:
        """What there is to evaluate."""
        return [a for a in (self.kv, self.recent) if a is not None]

    @property
    def keys(self) -> mx.array | None:
        """[B, num_key_value_heads, capacity, head_dim]: a view, made anew, since a view that is kept costs a copy."""
        self._gather()
        return None if self.kv is None else halves(self.kv)[0]

    @property
    def values(self) -> mx.array | None:
        """Like `keys`."""
        self._gather()
        return None if self.kv is None else halves(self.kv)[1]

    def reserve(self, count: int) -> None:
        """Raise MemoryLimitError if `count` more positions would pass the limit."""
        if self.limit is not None and self.offset + count > self.limit:
            raise MemoryLimitError(
                f"[KVCache] {self.offset + count} positions are needed and {self.limit} are allowed; "
                "shorten the prompt, ask for fewer tokens, or raise --max-kv-size where the model allows it"
            )

    def append(self, kv: mx.array) -> tuple[mx.array, mx.array]:
        """Add keys and values [2, B, heads, L, D]; returns all keys and all values, [B, heads, offset, D], as views."""
        self._gather()
        self.reserve(kv.shape[3])
        held = self._write(kv)
        return held[0, :, :, : self._past], held[1, :, :, : self._past]

    def open(self, like: tuple[int, ...], dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """`kv` and `recent` for a step that adds one position; `lengths` say what is filled. `close` ends the step.

        like: the shape of one position, (2, B, heads, 1, D), for an empty cache.
        """
        self.reserve(1)
        if self._late == RECENT:
            self._gather()
        if self.kv is None:
            self.kv = self._grown(mx.zeros(like, dtype), 1)
        if self.recent is None:
            two, b, heads, _, dim = like
            self.recent = mx.zeros((two, b, heads, RECENT, dim), dtype)
        return self.kv, self.recent

    def close(self, recent: mx.array) -> None:
        """The step's own `recent`, with one more position."""
        self.recent = recent
        self._late += 1

    def _gather(self) -> None:
        """Move the recent positions into kv."""
        if self._late and self.recent is not None:
            late, self._late = self._late, 0
            self._write(self.recent[:, :, :, :late])

    def _write(self, new: mx.array) -> mx.array:
        """Put positions behind those of kv; returns kv."""
        end = self._past + new.shape[3]
        held = self._grown(new, end)
        held[:, :, :, self._past : end] = new  # in place: MLX writes into the array where nothing else holds it
        self.kv, self._past = held, end
        return held

    def copy(self, start: int, end: int) -> list[mx.array]:
        """Filled positions from `start` up to `end`, in an array of their own, not yet evaluated."""
        self._gather()
        assert self.kv is not None and end <= self._past
        return [mx.contiguous(self.kv[:, :, :, start:end])]

    def extend(self, copies: Sequence[list[mx.array]]) -> None:
        """Put copies of the positions that follow behind the filled ones. Raises MemoryLimitError past the limit."""
        new = mx.concatenate([kv for (kv,) in copies], axis=3)
        self._gather()
        self.reserve(new.shape[3])
        self._write(new)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """The same for keys and values [B, heads, L, D] that come apart, as mlx-lm's caches are called."""
        return self.append(mx.stack([keys, values]))

    def _grown(self, new: mx.array, end: int) -> mx.array:
        """An array with room for `end` positions: the one held, or its filled part followed by zeros."""
        held = self.kv
        if held is not None and end <= held.shape[3]:
            return held
        room = capacity(end, self.limit)
        two, b, heads, _, dim = new.shape
        zeros = mx.zeros((two, b, heads, room - (0 if held is None else self._past), dim), new.dtype)
        return zeros if held is None else mx.concatenate([held[:, :, :, : self._past], zeros], axis=3)

    @property
    def state(self) -> tuple[mx.array | None, mx.array | None, int]:
        """(keys, values, offset): what mlx-lm evaluates, saves and restores."""
        return self.keys, self.values, self.offset

    @state.setter
    def state(self, value: Sequence[Any]) -> None:
        keys, values, self._past = value
        self.recent, self._late = None, 0
        self.kv = None if keys is None else mx.stack([keys, values])
        if self.kv is not None:
            mx.eval(self.kv)  # a lazy array belongs to the thread that made it

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
        late = min(self._late, n)
        self._late -= late
        self._past -= n - late
        return n

    def size(self) -> int:
        """Filled positions."""
        return self.offset

    def empty(self) -> bool:
        return self.kv is None

    def shrink(self) -> int:
        """Give back the room behind the filled positions; returns the bytes freed. The next token makes room again."""
        before = self.nbytes
        self._gather()
        self.recent = None
        if self._past == 0:
            self.kv = None
        elif self.kv is not None and self._past < self.kv.shape[3]:
            self.kv = mx.contiguous(self.kv[:, :, :, : self._past])
            mx.eval(self.kv)
        return before - self.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(a.nbytes for a in self.arrays)

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
        self._gather()
        if self.kv is not None:
            keys, values = halves(self.kv)
            quantized.keys = mx.quantize(keys, group_size=group_size, bits=bits)
            quantized.values = mx.quantize(values, group_size=group_size, bits=bits)
        return quantized

    @staticmethod
    def merge(caches: Sequence[Any]) -> Any:
        """mlx-lm's batch cache over several sequences' caches, which its server asks for. Imports mlx_lm."""
        from bitnet_mlx import _mlxlm

        return _mlxlm.module("models.cache").BatchKVCache.merge(caches)


def halves(kv: mx.array) -> tuple[mx.array, mx.array]:
    """Keys and values of [2, B, heads, L, D], as views. An index by a single number would gather, which copies."""
    return kv[0, :], kv[1, :]


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

    def copy(self, start: int, end: int) -> Excerpt:  # type: ignore[override]
        """Filled positions from `start` up to `end`, of all layers; evaluated."""
        parts = [cache.copy(start, end) for cache in self]
        mx.eval(parts)
        return Excerpt(parts, end - start, sum(array.nbytes for arrays in parts for array in arrays))

    def extend(self, excerpts: Sequence[Any]) -> None:  # type: ignore[override]
        """Put copies of the positions that follow behind the filled ones, in every layer; a list would take more layers.

        Raises MemoryLimitError past the limit.
        """
        for layer, cache in enumerate(self):
            cache.extend([excerpt.parts[layer] for excerpt in excerpts])
        mx.eval([cache.arrays for cache in self])

    def shrink(self) -> int:
        """Give back unused room, layer after layer; returns the bytes freed."""
        return sum(cache.shrink() for cache in self)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(cache.nbytes for cache in self)
