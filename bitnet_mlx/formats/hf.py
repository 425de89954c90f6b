"""The packed layout of Hugging Face's BitNet checkpoints: uint8 [ceil(N / 4), K], four rows of the weight in a byte.

With n = ceil(N / 4), row r lies in byte row r mod n at bits 2 * (r div n), code = t + 1: rows n apart share a byte, not
neighbours. Where N is not a multiple of 4 the fields past row N hold 0 and are cropped. Code 3 does not occur.

Both directions work on blocks of byte rows that fit a core's second-level cache, four codes of a uint32 at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bitnet_mlx.errors import FormatError
from bitnet_mlx.formats import fields
from bitnet_mlx.ternary import CODES_PER_WORD, ZERO_WORD, padded

FIELDS = 4  # rows of the weight in a byte
_BLOCK_BYTES = 1 << 18


def packed_rows(n: int) -> int:
    """Byte rows that hold N rows of a weight: ceil(N / 4)."""
    return -(-n // FIELDS)


def to_words2(packed: np.ndarray, n: int, name: str = "weight") -> np.ndarray:
    """uint8 [ceil(N / 4), K] -> words2, uint32 [N, padded(K) / 16].

    name: the tensor, for messages. Raises FormatError on another dtype or shape and on code 3.
    """
    if packed.dtype != np.uint8 or packed.ndim != 2 or packed.shape[0] != packed_rows(n):
        raise FormatError(
            f"[hf] tensor {name} is {packed.dtype} {packed.shape}; "
            f"a packed weight of {n} rows is uint8 [{packed_rows(n)}, K]"
        )
    rows, k = packed.shape
    out = np.empty((n, padded(k) // CODES_PER_WORD), np.uint32)
    out_bytes = out.view(np.uint8)
    for part in _blocks(rows, padded(k)):
        codes = _wide_block(packed[part], part, name)
        for field in range(FIELDS):
            first = field * rows + part.start
            count = min(part.stop - part.start, n - first)
            if count > 0:
                out_bytes[first : first + count] = fields.gather(codes[:count] >> np.uint32(2 * field))
    return out


def from_words2(words: np.ndarray, k: int) -> np.ndarray:
    """words2, uint32 [N, padded(K) / 16] -> uint8 [ceil(N / 4), K]; fields past row N hold 0."""
    n = words.shape[0]
    rows = packed_rows(n)
    out = np.zeros((rows, k), np.uint8)
    for part in _blocks(rows, padded(k)):
        block = np.zeros((part.stop - part.start, padded(k) // 4), np.uint32)
        for field in range(FIELDS):
            first = field * rows + part.start
            count = min(part.stop - part.start, n - first)
            if count > 0:
                four = np.ascontiguousarray(words[first : first + count]).view(np.uint8).astype(np.uint32)
                block[:count] |= fields.spread(four) << np.uint32(2 * field)
        out[part] = block.view(np.uint8)[:, :k]
    return out


def count_zeros(packed: np.ndarray, name: str = "weight") -> int:
    """Zero weights of a packed weight. Raises FormatError, naming the tensor, on code 3."""
    zeros = 0
    flat = np.ascontiguousarray(packed).reshape(-1)
    for start in range(0, flat.size, _BLOCK_BYTES):
        block = flat[start : start + _BLOCK_BYTES]
        low, high = block & np.uint8(0x55), block >> np.uint8(1) & np.uint8(0x55)
        if (low & high).any():
            raise FormatError(f"[hf] tensor {name} holds code 3; codes are 0, 1 and 2 (t + 1)")
        # Code 1 has its low bit set and its high bit clear; unused fields hold 0.
        low &= ~high
        whole = low.size // 8 * 8
        zeros += int(np.bitwise_count(low[:whole].view(np.uint64)).sum(dtype=np.int64))
        zeros += int(np.bitwise_count(low[whole:]).sum(dtype=np.int64))
    return zeros


def _blocks(rows: int, row_bytes: int) -> Iterator[slice]:
    step = max(1, _BLOCK_BYTES // max(row_bytes, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _wide_block(block: np.ndarray, part: slice, name: str) -> np.ndarray:
    """Byte rows widened to padded(K) with code 1 in every field, as uint32; FormatError on code 3."""
    count, k = block.shape
    wide = np.empty((count, padded(k)), np.uint8)
    wide[:, :k] = block
    wide[:, k:] = 0x55
    four = wide.view(np.uint32)
    three = four & (four >> np.uint32(1)) & ZERO_WORD
    if three.any():
        row, column = np.argwhere(three.view(np.uint8))[0]
        raise FormatError(
            f"[hf] tensor {name} holds code 3 in byte row {part.start + int(row)}, column {int(column)}; "
            "codes are 0, 1 and 2 (t + 1)"
        )
    return four
