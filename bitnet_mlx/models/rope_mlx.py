"""Rotary embedding on MLX, by explicit frequencies: mx.fast.rope(base=...) is 9e-4 off transformers at position 4000."""

from __future__ import annotations

import numpy as np

from bitnet_mlx.backends.mlx_import import mx
from bitnet_mlx.models.config import DecoderConfig, inverse_frequencies


class Rotary:
    """Rotates halves of the last axis by the angles of a configuration."""

    def __init__(self, config: DecoderConfig) -> None:
        inverse, self.factor = inverse_frequencies(config)
        self.dims = config.head_dim
        self.freqs = mx.array(reciprocals(inverse))
        mx.eval(self.freqs)

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        """x: [B, heads, L, D] at positions offset, offset + 1, ...; offset may be an array [B]. Same shape and dtype."""
        y = mx.fast.rope(x, self.dims, traditional=False, base=None, scale=1.0, offset=offset, freqs=self.freqs)
        # YaRN multiplies cos and sin, which is the same as multiplying what they rotate.
        return y if self.factor == 1.0 else y * self.factor


def reciprocals(inverse: np.ndarray) -> np.ndarray:
    """float32 f with 1 / f as near to `inverse` as float32 has it: MLX takes f and divides by it.

    Equal where `inverse` itself was computed as 1 / f; else within one rounding, at the low frequencies of scaled kinds.
    """
    guess = np.float32(1) / inverse
    steps = np.arange(-4, 5, dtype=np.int32)[:, None]
    candidates = (guess.view(np.int32)[None] + steps).view(np.float32)
    error = np.abs(np.float32(1) / candidates - inverse)
    return np.take_along_axis(candidates, error.argmin(axis=0)[None], axis=0)[0]
