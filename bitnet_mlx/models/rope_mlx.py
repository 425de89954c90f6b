"""Rotary embedding on MLX, by explicit frequencies: mx.fast.rope(base=...) is 9e-4 off transformers at position 4000."""

from __future__ import annotations

import numpy as np

from bitnet_mlx.backends.mlx_import import mx
from bitnet_mlx.models.config import DecoderConfig, inverse_frequencies


class Rotary:
    """Rotates halves of the last axis by position * inverse frequency, the product rounded to float32.

    mx.fast.rope does it where float32 has reciprocals of all the frequencies: it takes f and divides by it. Some of
    YaRN's have none, and one rounding of a frequency is an angle of 1e-4 at position 2000; those take plain operations.
    """

    def __init__(self, config: DecoderConfig) -> None:
        inverse, self.factor = inverse_frequencies(config)
        self.dims = config.head_dim
        self.inverse = mx.array(inverse)
        freqs = reciprocals(inverse)
        self.exact = np.array_equal(np.float32(1) / freqs, inverse)
        self.freqs = mx.array(freqs)
        mx.eval(self.inverse, self.freqs)

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        """x: [B, heads, L, D] at positions offset, offset + 1, ...; offset may be an array [B]. Same shape and dtype."""
        if self.exact:
            y = mx.fast.rope(x, self.dims, traditional=False, base=None, scale=1.0, offset=offset, freqs=self.freqs)
        else:
            y = self._rotate(x, offset)
        # YaRN multiplies cos and sin, which is the same as multiplying what they rotate.
        return y if self.factor == 1.0 else y * self.factor

    def _rotate(self, x: mx.array, offset: int | mx.array) -> mx.array:
        start = mx.array(offset).reshape(-1, 1, 1, 1)
        positions = (start + mx.arange(x.shape[2])[:, None]).astype(mx.float32)
        angles = positions * self.inverse  # [B or 1, 1, L, D / 2]
        cos, sin = mx.cos(angles), mx.sin(angles)
        a, b = mx.split(x.astype(mx.float32), 2, axis=-1)
        return mx.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def reciprocals(inverse: np.ndarray) -> np.ndarray:
    """float32 f with 1 / f as near to `inverse` as float32 has it; equal where `inverse` was itself computed as 1 / f."""
    guess = np.float32(1) / inverse
    steps = np.arange(-4, 5, dtype=np.int32)[:, None]
    candidates = (guess.view(np.int32)[None] + steps).view(np.float32)
    error = np.abs(np.float32(1) / candidates - inverse)
    return np.take_along_axis(candidates, error.argmin(axis=0)[None], axis=0)[0]
