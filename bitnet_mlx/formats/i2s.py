"""I2_S, bitnet.cpp's 2-bit tensors: N K / 4 bytes of codes t + 1, one float32 scale (w = t * scale), 28 bytes unused.

Three layouts exist, and nothing in a file tells which it has. Each is a run of chunks of W bytes for 4 W weights,
weight j of a chunk in byte j mod W at bits 6 - 2 * (j div W), over the whole tensor row by row:

    "128"   W = 32: blocks of 128 weights, which may cross rows. The published files; x86.
    "64"    W = 16: blocks of 64 weights. Files quantised on ARM since November 2025.
    "rows"  W = K: four neighbouring rows in a byte. Files of an x86 build without ACT_PARALLEL.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from bitnet_mlx.errors import ConfigError, FormatError
from bitnet_mlx.formats import fields
from bitnet_mlx.ternary import CODES_PER_WORD, ZERO_WORD, padded

LAYOUTS = ("128", "64", "rows")
TAIL = 32  # bytes after the codes: the scale and 28 unused
_AT_ONCE = 1 << 20  # weights converted at a time


def nbytes(n: int, k: int) -> int:
    """Bytes of a tensor."""
    return n * k // 4 + TAIL


def fits(n: int, k: int, layout: str) -> bool:
    """Whether a tensor of this shape can have the layout: whole chunks, and rows of whole bytes of words2."""
    return k % 4 == 0 and (n * k) % (4 * _width(k, layout)) == 0


def to_words2(data: np.ndarray, n: int, k: int, layout: str, name: str = "weight") -> tuple[np.ndarray, np.float32]:
    """uint8 [N K / 4 + 32] -> (words2 uint32 [N, padded(K) / 16], scale).

    name: the tensor, for messages. Raises FormatError on another size, on code 3, on a scale that is not above 0 and
    finite, and where the shape does not divide into the layout's chunks; ConfigError on an unknown layout.
    """
    scale = _scale(data, n, k, name)
    _check(n, k, layout, name)
    words = np.full((n, padded(k) // CODES_PER_WORD), 0x55555555, np.uint32)
    out = words.view(np.uint8)
    width = _width(k, layout)
    for part in _row_blocks(n, k, width):
        chunks = np.frombuffer(data[part.start * k // 4 : part.stop * k // 4].tobytes(), "<u4").astype(
            np.uint32, copy=False
        )
        _refuse_three(chunks, part.start * k // 4, name)
        codes = fields.to_words2_bytes(chunks.reshape(-1, width // 4), fields.HIGH_FIRST)
        out[part, : k // 4] = codes.reshape(-1, k // 4)
    return words, scale


def count_zeros(data: np.ndarray, n: int, k: int, name: str = "weight") -> int:
    """How many of the weights of uint8 [N K / 4 + 32] are 0, whatever the layout: no conversion is needed to tell.

    Raises FormatError on another size, on code 3 and on a scale that is not above 0 and finite.
    """
    _scale(data, n, k, name)
    ones, end = 0, n * k // 4
    for start in range(0, end, _AT_ONCE):
        chunk = data[start : min(start + _AT_ONCE, end)].view("<u4")
        _refuse_three(chunk, start, name)
        # Code 1 has its low bit set and its high bit clear.
        ones += int(np.bitwise_count(chunk & ~(chunk >> np.uint32(1)) & ZERO_WORD).sum(dtype=np.int64))
    return ones


def _scale(data: np.ndarray, n: int, k: int, name: str) -> np.float32:
    if data.dtype != np.uint8 or data.shape != (nbytes(n, k),):
        raise FormatError(
            f"[I2_S] tensor {name} is {data.dtype} {data.shape}; {n} rows of {k} weights are uint8 [{nbytes(n, k)}]"
        )
    scale = np.frombuffer(data[n * k // 4 :].tobytes(), "<f4", 1)[0].astype(np.float32)
    if not (np.isfinite(scale) and scale > 0):
        raise FormatError(f"[I2_S] tensor {name} has the scale {scale}; a scale must be finite and above 0")
    return scale


def _refuse_three(chunks: np.ndarray, first_byte: int, name: str) -> None:
    three = fields.first_three(chunks)
    if three is not None:
        raise FormatError(
            f"[I2_S] tensor {name} holds code 3 in byte {first_byte + three}; codes are 0, 1 and 2 (t + 1)"
        )


def from_words2(words: np.ndarray, scale: float | np.float32, k: int, layout: str = "128") -> np.ndarray:
    """words2 uint32 [N, padded(K) / 16] and the tensor's scale -> uint8 [N K / 4 + 32]; the unused bytes are 0."""
    n = words.shape[0]
    _check(n, k, layout, "weight")
    data = np.zeros(nbytes(n, k), np.uint8)
    width = _width(k, layout)
    for part in _row_blocks(n, k, width):
        rows = np.ascontiguousarray(words[part]).astype("<u4", copy=False).view(np.uint8)
        codes = np.ascontiguousarray(rows[:, : k // 4]).reshape(-1, 4, width // 4)
        packed = fields.from_words2_bytes(codes, fields.HIGH_FIRST).astype("<u4", copy=False)
        data[part.start * k // 4 : part.stop * k // 4] = packed.view(np.uint8).reshape(-1)
    data[n * k // 4 : n * k // 4 + 4] = np.array([scale], "<f4").view(np.uint8)
    return data


def _width(k: int, layout: str) -> int:
    if layout not in LAYOUTS:
        raise ConfigError(f"[I2_S] the layout is {layout!r}; {', '.join(LAYOUTS)} are allowed")
    return {"128": 32, "64": 16, "rows": k}[layout]


def _check(n: int, k: int, layout: str, name: str) -> None:
    if not fits(n, k, layout):
        raise FormatError(
            f"[I2_S] tensor {name} of {n} rows of {k} weights does not divide into chunks of {4 * _width(k, layout)} "
            f"weights (layout {layout}) and rows of whole bytes"
        )


def _row_blocks(n: int, k: int, width: int) -> Iterator[slice]:
    """Rows in blocks of about _AT_ONCE weights that begin and end with a chunk."""
    whole = math.lcm(4 * width, k) // k  # the fewest rows of whole chunks
    step = whole * max(1, _AT_ONCE // (whole * k))
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))
