"""ggml's ternary blocks TQ1_0 and TQ2_0: 256 weights along K with one float16 scale d behind them.

TQ2_0, 64 + 2 bytes: weight i in byte (i div 128) * 32 + i mod 32, at bits 2 * ((i mod 128) div 32), code t + 1.

TQ1_0, 48 + 4 + 2 bytes, digits t + 1 in base 3, the first of a byte the most significant of value; stored is
ceil(256 value / 243), read by multiplying with 3 and taking what passes 256. Weight i below 160: byte i mod 32, digit
i div 32. Below 240: byte 32 + (i - 160) mod 16, digit (i - 160) div 16. From 240 on: byte 48 + (i - 240) mod 4, digit
(i - 240) div 4, and a fifth digit 0.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bitnet_mlx.errors import FormatError
from bitnet_mlx.formats import fields, words2
from bitnet_mlx.formats.block_scales import used_blocks
from bitnet_mlx.ternary import CODES_PER_WORD, GROUP

BLOCK = 256  # weights
BYTES = {"TQ1_0": 54, "TQ2_0": 66}  # a block, with its scale
_DIGITS = ((0, 32, 5, 0), (32, 16, 5, 160), (48, 4, 4, 240))  # first byte, bytes, digits, first weight
_POWERS = (1, 3, 9, 27, 81)
_AT_ONCE = 1 << 20  # weights converted at a time


def row_bytes(kind: str, k: int, name: str = "weight") -> int:
    """Bytes of a row of K weights. Raises FormatError where K is not a multiple of 256."""
    if k % BLOCK:
        raise FormatError(f"[{kind}] tensor {name} has rows of {k} weights; this layout needs a multiple of {BLOCK}")
    return k // BLOCK * BYTES[kind]


def to_words2(data: np.ndarray, k: int, kind: str, name: str = "weight") -> tuple[np.ndarray, np.ndarray]:
    """uint8 [N, row_bytes] -> (words2 uint32 [N, K / 16], block scales float32 [N, K / 256]).

    kind: "TQ1_0" or "TQ2_0". name: the tensor, for messages. Raises FormatError on another dtype or shape and, for
    TQ2_0, on code 3.
    """
    width = row_bytes(kind, k, name)
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != width:
        raise FormatError(
            f"[{kind}] tensor {name} is {data.dtype} {data.shape}; rows of {k} weights are uint8 [N, {width}]"
        )
    n, blocks = data.shape[0], k // BLOCK
    words = np.empty((n, k // CODES_PER_WORD), np.uint32)
    d = np.empty((n, blocks), np.float32)
    for part in _row_blocks(n, k):
        block = data[part].reshape(-1, BYTES[kind])
        d[part] = np.ascontiguousarray(block[:, -2:]).view("<f2").astype(np.float32).reshape(-1, blocks)
        if kind == "TQ2_0":
            words[part] = _decode_2(block, part.start, k, name).reshape(-1, words.shape[1])
        else:
            words[part] = words2.pack_codes(_decode_1(block)).reshape(-1, words.shape[1])
    return words, d


def from_words2(words: np.ndarray, scale: np.ndarray, k: int, kind: str, name: str = "weight") -> np.ndarray:
    """words2 uint32 [N, K / 16] and a scale float32 [], [N] or [N, K / 128] -> uint8 [N, row_bytes].

    A block of zeros gets the scale 0, as ggml writes it. Raises FormatError where K is not a multiple of 256, where
    float16 cannot hold a scale (it becomes 0 or infinite), or where the two groups of a block differ in scale.
    """
    width, n, blocks = row_bytes(kind, k, name), words.shape[0], k // BLOCK
    d = _block_scales(scale, n, blocks, kind, name)
    d = np.where(used_blocks(words, BLOCK, blocks), d, np.float16(0))
    out = np.empty((n, width), np.uint8)
    for part in _row_blocks(n, k):
        block = out[part].reshape(-1, BYTES[kind])
        rows = np.ascontiguousarray(words[part]).astype("<u4", copy=False)
        if kind == "TQ2_0":
            codes = rows.view(np.uint8).reshape(-1, 4, 8)
            packed = fields.from_words2_bytes(codes, fields.LOW_FIRST).astype("<u4", copy=False)
            block[:, :64] = packed.view(np.uint8).reshape(-1, 64)
        else:
            _encode_1((words2.unpack(rows, k) + np.int8(1)).view(np.uint8).reshape(-1, BLOCK), block)
        block[:, -2:] = d[part].astype("<f2").reshape(-1, 1).view(np.uint8)
    return out


def _row_blocks(n: int, k: int) -> Iterator[slice]:
    step = max(1, _AT_ONCE // max(k, 1))
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def _decode_2(block: np.ndarray, first_row: int, k: int, name: str) -> np.ndarray:
    """Blocks uint8 [B, 66] -> words2 uint32 [B, 16]."""
    chunks = np.ascontiguousarray(block[:, :64]).view("<u4").astype(np.uint32, copy=False)
    three = fields.first_three(chunks)
    if three is not None:
        row, column = first_row + three // 64 // (k // BLOCK), three // 64 % (k // BLOCK)
        raise FormatError(
            f"[TQ2_0] tensor {name} holds code 3 in row {row}, block {column}; codes are 0, 1 and 2 (t + 1)"
        )
    codes = fields.to_words2_bytes(chunks.reshape(-1, 8), fields.LOW_FIRST)
    return codes.reshape(-1, 64).view("<u4")


def _decode_1(block: np.ndarray) -> np.ndarray:
    """Blocks uint8 [B, 54] -> codes uint8 [B, 256]."""
    codes = np.empty((block.shape[0], BLOCK), np.uint8)
    for first, count, digits, at in _DIGITS:
        packed = block[:, first : first + count]
        for digit in range(digits):
            v = packed * np.uint8(_POWERS[digit])  # modulo 256
            # What 3 v passes 256 by: 0, 1 or 2.
            low = at + digit * count
            codes[:, low : low + count] = (v >= 86).view(np.uint8) + (v >= 171).view(np.uint8)
    return codes


def _encode_1(codes: np.ndarray, block: np.ndarray) -> None:
    """Codes uint8 [B, 256] -> the first 52 bytes of blocks uint8 [B, 54], in place."""
    for first, count, digits, at in _DIGITS:
        value = np.zeros((codes.shape[0], count), np.uint16)
        for digit in range(5):
            value *= np.uint16(3)
            if digit < digits:
                value += codes[:, at + digit * count : at + (digit + 1) * count]
        block[:, first : first + count] = (256 * value + np.uint16(242)) // np.uint16(243)


def _block_scales(scale: np.ndarray, n: int, blocks: int, kind: str, name: str) -> np.ndarray:
    """float16 [N, blocks]."""
    if scale.ndim == 2:
        pairs = scale.reshape(n, blocks, BLOCK // GROUP)
        if (pairs != pairs[..., :1]).any():
            raise FormatError(
                f"[{kind}] tensor {name} has a scale for each {GROUP} columns, and some differ inside a block of {BLOCK}; "
                "this layout has one scale a block"
            )
        scale = pairs[..., 0]
    elif scale.ndim == 1:
        scale = scale[:, None]
    with np.errstate(over="ignore"):
        d = scale.astype(np.float16)
    lost = ~np.isfinite(d) | ((d == 0) & (scale != 0))
    if lost.any():
        raise FormatError(
            f"[{kind}] tensor {name} has the scale {float(scale[lost][0]):g}; this layout holds scales as float16, "
            "from 6e-8 to 65504"
        )
    return np.broadcast_to(d, (n, blocks))
