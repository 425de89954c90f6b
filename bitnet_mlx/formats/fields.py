"""Codes that lie W apart: the turn that ggml's 2-bit layouts need on the way to words2 and back.

A chunk of W bytes holds 4 W codes: code j lies in byte j mod W, in field j div W of that byte. words2 puts four
neighbours in a byte instead. Both directions handle four codes of a uint32 at a time; W is a multiple of 4.
"""

from __future__ import annotations

import numpy as np

from bitnet_mlx.ternary import ZERO_WORD

LOW_FIRST = (0, 2, 4, 6)  # shifts of fields 0 to 3
HIGH_FIRST = (6, 4, 2, 0)

_CODE_IN_BYTE = np.uint32(0x03030303)
# A product with this gathers the low two bits of four bytes in the top byte: c0 << 24 | c1 << 26 | c2 << 28 | c3 << 30.
# No two terms of the product meet, so nothing carries.
_GATHER = np.uint32(1 << 24 | 1 << 18 | 1 << 12 | 1 << 6)


def first_three(packed: np.ndarray) -> int | None:
    """The place of the first byte (in the flat array of uint32) that holds a code 3, or None."""
    three = packed & (packed >> np.uint32(1)) & ZERO_WORD
    if not three.any():
        return None
    return int(np.flatnonzero(np.ascontiguousarray(three).astype("<u4", copy=False).view(np.uint8).reshape(-1))[0])


def gather(four: np.ndarray) -> np.ndarray:
    """uint32 with a code in the low two bits of each byte -> uint32 below 256, the words2 byte of the four. In place."""
    four &= _CODE_IN_BYTE
    four *= _GATHER
    four >>= np.uint32(24)
    return four


def spread(byte: np.ndarray) -> np.ndarray:
    """uint32 below 256, a words2 byte -> uint32 with a code in the low two bits of each byte. In place."""
    byte |= byte << np.uint32(12)
    byte |= byte << np.uint32(6)
    byte &= _CODE_IN_BYTE
    return byte


def to_words2_bytes(chunks: np.ndarray, shifts: tuple[int, ...]) -> np.ndarray:
    """uint32 [B, W / 4], chunks of W bytes -> uint8 [B, 4, W / 4], the words2 bytes of their 4 W codes in order."""
    out = np.empty((chunks.shape[0], 4, chunks.shape[1]), np.uint8)
    for field, shift in enumerate(shifts):
        out[:, field] = gather(chunks >> np.uint32(shift))
    return out


def from_words2_bytes(codes: np.ndarray, shifts: tuple[int, ...]) -> np.ndarray:
    """uint8 [B, 4, W / 4] -> uint32 [B, W / 4]: the inverse of to_words2_bytes."""
    out = np.zeros((codes.shape[0], codes.shape[2]), np.uint32)
    for field, shift in enumerate(shifts):
        out |= spread(codes[:, field].astype(np.uint32)) << np.uint32(shift)
    return out
