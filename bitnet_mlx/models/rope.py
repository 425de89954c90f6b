"""Rotary position embedding: inverse frequencies of each scaling kind, and the cos and sin tables.

In float32 and transformers' order, since a rounding of 6e-8 in a frequency is an angle of 1e-4 at position 2000.
Kinds: default; linear (position / factor); llama3 (low frequencies divided, a ramp between); yarn (arXiv 2309.00071).
"""

from __future__ import annotations

import math

import numpy as np

from bitnet_mlx.errors import UnsupportedModelError
from bitnet_mlx.models.config import RopeConfig

_F = np.float32


def scaled_frequencies(rope: RopeConfig, head_dim: int, max_position: int) -> tuple[np.ndarray, float]:
    """Inverse frequencies float32 [head_dim / 2] and the factor that multiplies cos and sin."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / _F(head_dim)
    # In float64 and rounded once: NumPy's float32 power is off by an ulp where the processor has AVX-512.
    base = _F(1) / np.power(np.float64(_F(rope.rope_theta)), exponent.astype(np.float64)).astype(np.float32)
    if rope.rope_type == "default":
        return base, 1.0
    if rope.rope_type == "linear":
        return base / _F(rope.factor), 1.0
    if rope.rope_type == "llama3":
        return _llama3(base, rope, max_position), 1.0
    if rope.rope_type == "yarn":
        return _yarn(base, rope, head_dim, max_position)
    raise UnsupportedModelError(
        f"[rope] rope_type is {rope.rope_type!r}; default, linear, llama3 and yarn are supported"
    )


def _llama3(base: np.ndarray, rope: RopeConfig, max_position: int) -> np.ndarray:
    """Wavelengths beyond the original context are divided by the factor; between two bounds the change is smooth."""
    original = rope.original_max_position_embeddings or max_position
    wavelength = _F(2 * math.pi) / base
    low, high = _F(original / rope.low_freq_factor), _F(original / rope.high_freq_factor)
    smooth = (_F(original) / wavelength - _F(rope.low_freq_factor)) / _F(rope.high_freq_factor - rope.low_freq_factor)
    mixed = (_F(1) - smooth) * base / _F(rope.factor) + smooth * base
    long = np.where(wavelength > low, base / _F(rope.factor), base)
    return np.where((wavelength <= low) & (wavelength >= high), mixed, long).astype(np.float32)


def _yarn(base: np.ndarray, rope: RopeConfig, head_dim: int, max_position: int) -> tuple[np.ndarray, float]:
    """Interpolated and plain frequencies mixed by a ramp over the dimensions between beta_fast and beta_slow rotations."""
    original = rope.original_max_position_embeddings or max_position

    def dimension(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - _F(low)) / _F(high - low), 0, 1)
    plain = _F(1) - ramp
    mixed = base / _F(rope.factor) * (_F(1) - plain) + base * plain

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    attention = rope.attention_factor
    if attention is None:
        if rope.mscale and rope.mscale_all_dim:
            attention = magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
        else:
            attention = magnitude(1.0)
    return mixed.astype(np.float32), float(attention)


def cos_sin(inverse: np.ndarray, factor: float, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin float32 [length, head_dim / 2] for positions start, start + 1, ...

    The angle is rounded to float32; its cosine is taken in float64 and rounded once, so it is the same everywhere.
    """
    positions = np.arange(start, start + length, dtype=np.float32)
    angles = (positions[:, None] * inverse[None, :]).astype(np.float64)
    return (np.cos(angles) * factor).astype(np.float32), (np.sin(angles) * factor).astype(np.float32)
