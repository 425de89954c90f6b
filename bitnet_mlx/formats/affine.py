"""MLX's affine layout: unsigned codes of 2, 4, 6 or 8 bits in uint32, low bits first, w = scale * code + bias a group.

Ternary weights are words2 without its padding, scale s and bias -s. Signed codes of a GroupedRows are shifted by
2^(bits-1): scale s and bias -2^(bits-1) * s. Both are exact in any float type, as powers of two times s.
"""

from __future__ import annotations

import numpy as np

from bitnet_mlx.ternary import CODES_PER_WORD, GROUP, ZERO_WORD, padded

GROUPS = (128, 64)  # sizes of a group that are written, in the order of preference


def group_for(widths: set[int]) -> int | None:
    """The largest group that divides every width, or None."""
    return next((group for group in GROUPS if not any(k % group for k in widths)), None)


def ternary_scales(scale: np.ndarray, shape: tuple[int, int], group: int) -> np.ndarray:
    """A TernaryTensor's scale [], [N] or [N, padded(K) / 128] -> float32 [N, K / group]."""
    n, k = shape
    if scale.ndim < 2:
        return np.broadcast_to(scale.reshape(-1, 1), (n, k // group)).astype(np.float32)
    return np.repeat(scale, GROUP // group, axis=1)[:, : k // group]


def ternary_words(words: np.ndarray, k: int) -> np.ndarray:
    """words2 [N, padded(K) / 16] -> uint32 [N, K / 16]; K must be a multiple of 16."""
    return np.ascontiguousarray(words[:, : k // CODES_PER_WORD])


def words2(codes: np.ndarray, k: int) -> np.ndarray:
    """uint32 [N, K / 16] of codes 0 to 2 -> words2, padded."""
    out = np.full((codes.shape[0], padded(k) // CODES_PER_WORD), ZERO_WORD, np.uint32)
    out[:, : codes.shape[1]] = codes
    return out


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """int8 [N, K] within +-(2^(bits-1) - 1), K a multiple of 64 -> uint32 [N, K * bits / 32]. bits: 8, 6 or 4."""
    n, k = codes.shape
    unsigned = (codes + np.int16(1 << (bits - 1))).astype(np.uint8)
    if bits == 8:
        packed = unsigned
    elif bits == 4:
        packed = unsigned[:, 0::2] | unsigned[:, 1::2] << 4
    else:  # four codes of six bits in three bytes
        four = unsigned.reshape(n, k // 4, 4).astype(np.uint32)
        bits24 = four[..., 0] | four[..., 1] << 6 | four[..., 2] << 12 | four[..., 3] << 18
        packed = np.stack([bits24 & 255, bits24 >> 8 & 255, bits24 >> 16], axis=-1).astype(np.uint8).reshape(n, -1)
    return np.ascontiguousarray(packed).view("<u4")


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """What `pack` made, uint32 [N, K * bits / 32] -> int8 [N, K]; the unsigned code 0 becomes -2^(bits-1)."""
    packed = np.ascontiguousarray(words).astype("<u4", copy=False).view(np.uint8)
    if bits == 8:
        unsigned = packed
    elif bits == 4:
        unsigned = np.stack([packed & 15, packed >> 4], axis=-1).reshape(packed.shape[0], -1)
    else:  # four codes of six bits in three bytes
        three = packed.reshape(packed.shape[0], -1, 3).astype(np.uint32)
        bits24 = three[..., 0] | three[..., 1] << 8 | three[..., 2] << 16
        codes = bits24[..., None] >> np.array([0, 6, 12, 18], np.uint32) & 63
        unsigned = codes.astype(np.uint8).reshape(packed.shape[0], -1)
    return (unsigned.astype(np.int16) - np.int16(1 << (bits - 1))).astype(np.int8)
