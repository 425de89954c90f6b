"""words2: MLX's 2-bit code words, the storage that every backend reads.

uint32, 16 codes a word, low bits first (value k of a row sits in word k div 16 at bits 2 * (k mod 16)), code = t + 1.
A row is padded to a multiple of 128 codes with code 1, the weight 0. Code 3 does not occur.
"""

from __future__ import annotations

import numpy as np

from bitnet_mlx.errors import FormatError
from bitnet_mlx.ternary import CODES_PER_WORD, ZERO_WORD, padded

# The four weights of each byte, as four int8 in one uint32: a row is decoded by one look-up a byte.
_FOUR_WEIGHTS = ((np.arange(256)[:, None] >> np.arange(0, 8, 2) & 3) - 1).astype(np.int8).view("<u4")[:, 0]
_CHECKED_AT_ONCE = 1 << 16  # words; a block and its temporary stay in a core's cache


def pack(t: np.ndarray) -> np.ndarray:
    """int8 [N, K] of -1, 0, 1 -> uint32 [N, padded(K) / 16]."""
    n, k = t.shape
    if t.size and (t.min() < -1 or t.max() > 1):
        raise FormatError(f"[words2.pack] values run from {t.min()} to {t.max()}; only -1, 0 and 1 can be packed")
    codes = np.ones((n, padded(k)), np.uint8)
    np.add(t, 1, out=codes[:, :k], casting="unsafe")
    return pack_codes(codes)


def pack_codes(codes: np.ndarray) -> np.ndarray:
    """uint8 codes [N, K], K a multiple of 16 -> uint32 [N, K / 16]."""
    n, k = codes.shape
    four = codes.reshape(n, k // 4, 4)
    packed = four[..., 0] | four[..., 1] << 2 | four[..., 2] << 4 | four[..., 3] << 6
    return np.ascontiguousarray(packed).view("<u4")


def unpack(words: np.ndarray, k: int) -> np.ndarray:
    """uint32 [N, ceil(K / 16) or more] -> int8 [N, K] of -1, 0, 1."""
    packed = np.ascontiguousarray(words).view(np.uint8)  # little endian: byte 0 holds the first four codes
    return _FOUR_WEIGHTS[packed].view(np.int8)[:, :k]


def check(words: np.ndarray, k: int, name: str) -> None:
    """Raise FormatError, naming the tensor, if a code is 3 or the padding past K is not code 1.

    Works in blocks of rows, so that a large weight costs one pass through memory and little of it.
    """
    width = words.shape[1]
    step = max(1, _CHECKED_AT_ONCE // max(width, 1))
    for start in range(0, words.shape[0], step):
        block = words[start : start + step]
        # A code is 3 where both of its bits are set.
        three = block >> np.uint32(1)
        three &= block
        three &= ZERO_WORD
        if three.any():
            row = start + int(np.argwhere(three)[0, 0])
            raise FormatError(f"[words2] tensor {name} holds code 3 in row {row}; codes are 0, 1 and 2 (t + 1)")
    whole, rest = divmod(k, CODES_PER_WORD)
    tail = words[:, whole:].copy()
    if rest and tail.size:
        keep = np.uint32(0xFFFFFFFF << (2 * rest) & 0xFFFFFFFF)
        tail[:, 0] = tail[:, 0] & keep | ZERO_WORD & ~keep
    if np.any(tail != ZERO_WORD):
        raise FormatError(f"[words2] tensor {name} has padding past column {k} that is not code 1 (the weight 0)")
