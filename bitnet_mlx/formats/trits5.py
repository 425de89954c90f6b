"""trits5: five weights a byte in base 3, 1.6 bits a weight, the second native storage.

Byte b of a row holds weights 5b .. 5b + 4; four bytes make a uint32, little endian, so 20 weights a word. The digits are
t + 1, the first weight's the most significant of value = 81 d0 + 27 d1 + 9 d2 + 3 d3 + d4, which is stored as the
fraction v = ceil(256 value / 243). Multiplying v by 3 shifts a digit out of the top: d0 = 3v div 256, then v = 3v mod 256,
and so on; rounding up keeps all five digits right. A row is padded to a whole word with weights 0, whose byte is 128.
"""

from __future__ import annotations

import numpy as np

from bitnet_mlx.errors import FormatError
from bitnet_mlx.formats import words2

WEIGHTS_PER_BYTE = 5
WEIGHTS_PER_WORD = 20
ZERO_WORD = np.uint32(0x80808080)  # twenty weights 0

_PLACES = np.array([81, 27, 9, 3, 1], np.uint8)
_STORED = (-(-256 * np.arange(243) // 243)).astype(np.uint8)  # value -> byte; 13 of the 256 bytes do not occur
_UNUSED = np.setdiff1d(np.arange(256, dtype=np.uint8), _STORED)
_BLOCK = 1 << 20  # weights converted or bytes checked at once: rows of a block, and not a whole weight, are copied


def _digits() -> np.ndarray:
    """int8 [256, 5]: a byte's weights, read as the kernel reads them."""
    v = np.arange(256, dtype=np.uint16)
    weights = []
    for _ in range(WEIGHTS_PER_BYTE):
        weights.append((3 * v >> 8).astype(np.int8) - np.int8(1))
        v = 3 * v & 255
    return np.stack(weights, axis=1)


_WEIGHTS = _digits()


def width(k: int) -> int:
    """uint32 words of a row of K weights."""
    return -(-k // WEIGHTS_PER_WORD)


def pack(t: np.ndarray) -> np.ndarray:
    """int8 [N, K] of -1, 0, 1 -> uint32 [N, ceil(K / 20)]. Raises FormatError for another value."""
    n, k = t.shape
    if t.size and (t.min() < -1 or t.max() > 1):
        raise FormatError(f"[trits5.pack] values run from {t.min()} to {t.max()}; only -1, 0 and 1 can be packed")
    words = np.empty((n, width(k)), np.uint32)
    for rows in _blocks(n, k):
        words[rows] = _pack_rows(t[rows])
    return words


def _pack_rows(t: np.ndarray) -> np.ndarray:
    n, k = t.shape
    digits = np.ones((n, width(k) * WEIGHTS_PER_WORD), np.uint8)
    np.add(t, 1, out=digits[:, :k], casting="unsafe")
    values = digits.reshape(n, -1, WEIGHTS_PER_BYTE) @ _PLACES  # at most 242
    return _STORED[values].view("<u4")


def unpack(words: np.ndarray, k: int) -> np.ndarray:
    """uint32 [N, ceil(K / 20)] -> int8 [N, K] of -1, 0, 1."""
    n = words.shape[0]
    packed = np.ascontiguousarray(words).astype("<u4", copy=False).view(np.uint8)
    return _WEIGHTS[packed].reshape(n, packed.shape[1] * WEIGHTS_PER_BYTE)[:, :k]


def check(words: np.ndarray, k: int, name: str) -> None:
    """Raise FormatError, naming the tensor, for a wrong width, a byte that cannot occur, or padding that is not 0."""
    if words.ndim != 2 or words.dtype != np.uint32 or words.shape[1] != width(k):
        raise FormatError(
            f"[trits5] tensor {name} is {words.dtype} {words.shape}; rows of {k} weights need uint32 [N, {width(k)}]"
        )
    for rows in _blocks(words.shape[0], 4 * width(k)):
        packed = np.ascontiguousarray(words[rows]).astype("<u4", copy=False).view(np.uint8)
        wrong = np.isin(packed, _UNUSED, kind="table")
        if wrong.any():
            row, column = (int(i) for i in np.argwhere(wrong)[0])
            raise FormatError(
                f"[trits5] tensor {name} holds byte {packed[row, column]} in row {rows.start + row}; "
                "it stands for no five weights"
            )
    first = k // WEIGHTS_PER_WORD
    tail = unpack(words[:, first:], (width(k) - first) * WEIGHTS_PER_WORD)
    if tail[:, k - first * WEIGHTS_PER_WORD :].any():
        raise FormatError(f"[trits5] tensor {name} has padding past column {k} that is not the weight 0")


def from_words2(words: np.ndarray, k: int) -> np.ndarray:
    """2-bit code words uint32 [N, padded(K) / 16] -> trits5 words uint32 [N, ceil(K / 20)]."""
    n = words.shape[0]
    out = np.empty((n, width(k)), np.uint32)
    for rows in _blocks(n, k):
        out[rows] = _pack_rows(words2.unpack(words[rows], k))
    return out


def to_words2(words: np.ndarray, k: int) -> np.ndarray:
    """trits5 words uint32 [N, ceil(K / 20)] -> 2-bit code words uint32 [N, padded(K) / 16]."""
    blocks = [words2.pack(unpack(words[rows], k)) for rows in _blocks(words.shape[0], k)]
    return np.concatenate(blocks) if blocks else words2.pack(np.zeros((0, k), np.int8))


def _blocks(n: int, per_row: int) -> list[slice]:
    """Rows in blocks of about _BLOCK elements."""
    step = max(1, _BLOCK // max(per_row, 1))
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]
