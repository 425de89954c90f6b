"""Rotary embedding's tables on MLX: the reference's own cos and sin, so that rotation is equal to the last bit anywhere.

mx.fast.rope(base=...) is 9e-4 off transformers at position 4000, and with explicit frequencies each device has its own
cosine. The tables grow as positions are reached; a step takes a view of them, or gathers rows where sequences of a
batch stand at different positions.
"""

from __future__ import annotations

from typing import Any

from bitnet_mlx.backends.mlx_import import mx
from bitnet_mlx.models.config import DecoderConfig, inverse_frequencies
from bitnet_mlx.models.rope import cos_sin

_STEP = 1024  # positions of a growth


class Rotary:
    """cos and sin float32 [positions, head_dim / 2] of one model, YaRN's factor included."""

    def __init__(self, config: DecoderConfig) -> None:
        self._inverse, self._factor = inverse_frequencies(config)
        self._cos = self._sin = mx.zeros((0, config.head_dim // 2))
        mx.eval(self._cos, self._sin)

    def at(self, cache: Any, length: int) -> tuple[mx.array, mx.array]:
        """Rows for `length` positions behind those that a layer's cache (or None) holds: [1 or B, length, D / 2]."""
        positions = getattr(cache, "positions", None)  # int32 [L] or [B, L], where a pass holds several sequences
        if positions is not None:
            self._reach(int(positions.max()) + 1)
            where = mx.array(positions.reshape(-1, length))
            return self._cos[where], self._sin[where]
        offset = 0 if cache is None else cache.offset
        if isinstance(offset, int):
            self._reach(offset + length)
            return self._cos[None, offset : offset + length], self._sin[None, offset : offset + length]
        self._reach(_furthest(cache) + length)
        # A sequence padded on the left begins below 0; what stands there is masked.
        positions = mx.maximum(offset.reshape(-1, 1) + mx.arange(length), 0)
        return self._cos[positions], self._sin[positions]

    def _reach(self, end: int) -> None:
        start = self._cos.shape[0]
        if end > start:
            more = -(-(end - start) // _STEP) * _STEP
            cos, sin = cos_sin(self._inverse, self._factor, start, more)
            self._cos = mx.concatenate([self._cos, mx.array(cos)])
            self._sin = mx.concatenate([self._sin, mx.array(sin)])
            mx.eval(self._cos, self._sin)  # a lazy array belongs to the thread that made it


def _furthest(cache: Any) -> int:
    """A bound on the offsets of a batch. mlx-lm's batch caches count on the host as well, which spares a wait."""
    for name in ("_offset", "_idx"):
        count = getattr(cache, name, None)
        if isinstance(count, int):
            return count
    return max(int(cache.offset.max().item()), 0)
