"""A key-value cache of fewer bits for the MLX decoder: bfloat16, or codes of 8 or 4 bits in groups along a head.

Attention gets one layer's keys and values back in the model's dtype, each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bitnet_mlx.backends.mlx_import import mx
from bitnet_mlx.models.cache import capacity
from bitnet_mlx.models.cache_mlx import KVCache, halves
from bitnet_mlx.models.demand import kv_group


class SmallKVCache:
    """One layer's. parts: bfloat16 [2, B, heads, capacity, D]; or codes, float32 scales and biases, capacity on axis 3."""

    reserve = KVCache.reserve

    def __init__(self, bits: int, head_dim: int, limit: int | None = None) -> None:
        """bits: 16, 8 or 4. Raises ConfigError where head_dim is no multiple of a group."""
        self.small, self.limit, self.offset = bits, limit, 0
        self._group = 0 if bits == 16 else kv_group(head_dim)
        self.parts: list[mx.array] = []

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Add keys and values [B, heads, L, D]; all of them so far, as they are held now, in the same dtype."""
        self.reserve(keys.shape[2])
        self._put(self._encoded(mx.stack([keys, values])))
        return halves(self._decoded([part[:, :, :, : self.offset] for part in self.parts], keys.dtype))

    def _put(self, new: list[mx.array]) -> None:
        end = self.offset + new[0].shape[3]
        held = self._grown(new, end)
        for part, rows in zip(held, new, strict=True):
            part[:, :, :, self.offset : end] = rows
        self.parts, self.offset = held, end

    def copy(self, start: int, end: int) -> list[mx.array]:
        """Filled positions from `start` up to `end`, as they are held, in arrays of their own; not yet evaluated."""
        return [mx.contiguous(part[:, :, :, start:end]) for part in self.parts]

    def extend(self, copies: Sequence[list[mx.array]]) -> None:
        """As KVCache.extend."""
        new = [mx.concatenate(list(rows), axis=3) for rows in zip(*copies, strict=True)]
        self.reserve(new[0].shape[3])
        self._put(new)

    def _encoded(self, kv: mx.array) -> list[mx.array]:
        if self.small == 16:
            return [kv.astype(mx.bfloat16)]
        return list(mx.quantize(kv.astype(mx.float32), group_size=self._group, bits=self.small))

    def _decoded(self, parts: list[mx.array], dtype: mx.Dtype) -> mx.array:
        if self.small == 16:
            return parts[0].astype(dtype)
        return mx.dequantize(*parts, group_size=self._group, bits=self.small).astype(dtype)

    def _grown(self, new: list[mx.array], end: int) -> list[mx.array]:
        if self.parts and end <= self.parts[0].shape[3]:
            return self.parts
        room = capacity(end, self.limit)
        found = []
        for i, rows in enumerate(new):
            two, b, heads, _, width = rows.shape
            zeros = mx.zeros((two, b, heads, room - (self.offset if self.parts else 0), width), rows.dtype)
            kept = [self.parts[i][:, :, :, : self.offset]] if self.parts else []
            found.append(mx.concatenate([*kept, zeros], axis=3) if kept else zeros)
        return found

    @property
    def arrays(self) -> list[mx.array]:
        """What there is to evaluate."""
        return self.parts

    @property
    def state(self) -> Any:
        """The same, as mlx-lm's loops evaluate it."""
        return self.parts

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(part.nbytes for part in self.parts)

    def is_trimmable(self) -> bool:
        return True

    def trim(self, n: int) -> int:
        """Forget the last n positions; returns how many were forgotten."""
        n = min(self.offset, n)
        self.offset -= n
        return n

    def shrink(self) -> int:
        """Give back the room behind the filled positions; returns the bytes freed."""
        before = self.nbytes
        kept = [mx.contiguous(part[:, :, :, : self.offset]) for part in self.parts] if self.offset else []
        mx.eval(kept)
        self.parts = kept
        return before - self.nbytes
