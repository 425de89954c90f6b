"""trits5: five weights a byte in base 3, 1.6 bits a weight, the second native storage.

Byte b of a row holds weights 5b .. 5b + 4; four bytes make a uint32, little endian, so 20 weights a word. The digits are
t + 1, the first weight's the most significant of value = 81 d0 + 27 d1 + 9 d2 + 3 d3 + d4, which is stored as the
fraction v = ceil(256 value / 243). Multiplying v by 3 shifts a digit out of the top: d0 = 3v div 256, then v = 3v mod 256,
and so on; rounding up keeps all five digits right. A row is padded to a whole word with weights 0, whose byte is 128.
"""

from __future__ import annotations

import numpy as np

from bitnet_mlx.errors import FormatError
from bitnet_mlx.ternary import padded

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
_CODES_OF_BYTE = ((_WEIGHTS + 1).astype(np.uint16) << np.arange(0, 10, 2, dtype=np.uint16)).sum(axis=1, dtype=np.uint16)
_ZERO_CODES = 0x55  # four 2-bit codes of the weight 0


def _by_codes() -> np.ndarray:
    """uint8 [1024]: the byte of five 2-bit codes, the first in the low bits; 0 where one of them is 3."""
    codes = np.arange(1024)[:, None] >> np.arange(0, 10, 2) & 3
    return np.where((codes < 3).all(axis=1), _STORED[np.minimum(codes, 2) @ _PLACES.astype(np.int64)], 0).astype(
        np.uint8
    )


_BYTE_OF_CODES = _by_codes()


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
    fives = digits.reshape(n, -1, WEIGHTS_PER_BYTE)
    values = fives[..., 0].copy()  # at most 242 in the end
    for place in range(1, WEIGHTS_PER_BYTE):
        values *= 3
        values += fives[..., place]
    return _STORED[values].view("<u4")


def unpack(words: np.ndarray, k: int) -> np.ndarray:
    """uint32 [N, ceil(K / 20)] -> int8 [N, K] of -1, 0, 1."""
    n = words.shape[0]
    packed = np.ascontiguousarray(words).astype("<u4", copy=False).view(np.uint8)
    return _WEIGHTS[packed].reshape(n, packed.shape[1] * WEIGHTS_PER_BYTE)[:, :k]


def check(words: np.ndarray, k: int, name: str) -> None:
    """Raise FormatError, naming the tensor, for a wrong width, a byte that cannot occur, or padding that is not 0."""
    if words.dtype != np.uint32 or words.shape[1] != width(k):
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
    """2-bit code words uint32 [N, padded(K) / 16] -> trits5 words uint32 [N, ceil(K / 20)].

    Twenty codes are 40 bits: five bytes there, four fields of 10 bits here.
    """
    n, count = words.shape[0], width(k)
    out = np.empty((n, count, 4), np.uint8)
    for rows in _blocks(n, k):
        raw = np.ascontiguousarray(words[rows]).astype("<u4", copy=False).view(np.uint8)[:, : 5 * count]
        bytes_ = np.full((raw.shape[0], 5 * count), _ZERO_CODES, np.uint8)
        bytes_[:, : raw.shape[1]] = raw
        b = bytes_.reshape(-1, count, 5).astype(np.uint16)
        fields = (
            b[..., 0] | (b[..., 1] & 3) << 8,
            b[..., 1] >> 2 | (b[..., 2] & 15) << 6,
            b[..., 2] >> 4 | (b[..., 3] & 63) << 4,
            b[..., 3] >> 6 | b[..., 4] << 2,
        )
        for i, field in enumerate(fields):
            out[rows, :, i] = _BYTE_OF_CODES[field]
    return out.reshape(n, 4 * count).view("<u4")


def to_words2(words: np.ndarray, k: int) -> np.ndarray:
    """trits5 words uint32 [N, ceil(K / 20)] -> 2-bit code words uint32 [N, padded(K) / 16]."""
    n, count, held = words.shape[0], width(k), padded(k) // 4
    out = np.full((n, held), _ZERO_CODES, np.uint8)
    for rows in _blocks(n, k):
        packed = np.ascontiguousarray(words[rows]).astype("<u4", copy=False).view(np.uint8)
        f = _CODES_OF_BYTE[packed.reshape(-1, count, 4)]
        b = np.empty((f.shape[0], count, 5), np.uint8)
        b[..., 0] = f[..., 0] & 255
        b[..., 1] = f[..., 0] >> 8 | (f[..., 1] & 63) << 2
        b[..., 2] = f[..., 1] >> 6 | (f[..., 2] & 15) << 4
        b[..., 3] = f[..., 2] >> 4 | (f[..., 3] & 3) << 6
        b[..., 4] = f[..., 3] >> 2
        flat = b.reshape(-1, 5 * count)[:, :held]  # what is cut off holds weights 0 of the padding
        out[rows, : flat.shape[1]] = flat
    return out.view("<u4")


def _blocks(n: int, per_row: int) -> list[slice]:
    """Rows in blocks of about _BLOCK elements."""
    step = max(1, _BLOCK // max(per_row, 1))
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]
