"""ggml's dense types to float32: F32, F16, BF16 and the block types Q8_0, Q4_0, Q6_K and Q4_K.

Q8_0, 32 weights: float16 d, 32 int8 q; w = q d.
Q4_0, 32 weights: float16 d, 16 bytes; weight i in the low half of byte i, weight 16 + i in its high half; w = (q - 8) d.
Q6_K, 256 weights: 128 bytes of low 4 bits, 64 bytes of high 2 bits, 16 int8 scales, float16 d; each 128 weights are four
runs of 32: run r takes byte (r mod 2) * 32 + i of the low bits, half r div 2, and bits 2 r of byte i of the high ones;
w = (d scale) (q - 32), one scale for 16 weights.
Q4_K, 256 weights: float16 d and m, 12 bytes of eight 6-bit scales and eight 6-bit offsets, 128 bytes of codes; run r of 32
weights lies in half r mod 2 of bytes (r div 2) * 32 + i; w = (d scale) q - (m offset). Of byte j below 4 of the 12 the
low 6 bits are scale j, of byte 4 + j offset j; byte 8 + j has the low 4 bits of scale 4 + j and of offset 4 + j (its high
half), whose top 2 bits are those of bytes j and 4 + j.
Products are rounded in this order, as the format's own library does.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bitnet_mlx.errors import FormatError
from bitnet_mlx.formats.dense import bfloat16_to_float32

PLAIN = {"F32": 4, "F16": 2, "BF16": 2}
BLOCKS = {"Q8_0": (32, 34), "Q4_0": (32, 18), "Q6_K": (256, 210), "Q4_K": (256, 144)}  # weights, bytes


def row_bytes(kind: str, k: int, name: str = "tensor") -> int:
    """Bytes of a row of K values. Raises FormatError where K does not divide into blocks."""
    if kind in PLAIN:
        return PLAIN[kind] * k
    weights, size = BLOCKS[kind]
    if k % weights:
        raise FormatError(f"[gguf] tensor {name}: rows of {k} values; {kind} needs a multiple of {weights}")
    return k // weights * size


def to_float32(data: np.ndarray, kind: str) -> np.ndarray:
    """Rows as they lie in the file, uint8 [N, row_bytes] -> float32 [N, K]."""
    data = np.ascontiguousarray(data)
    if kind == "F32":
        return data.view("<f4").astype(np.float32)
    if kind == "F16":
        return data.view("<f2").astype(np.float32)
    if kind == "BF16":
        return bfloat16_to_float32(data.view("<u2"))
    blocks = data.reshape(-1, BLOCKS[kind][1])
    return _DECODERS[kind](blocks).reshape(data.shape[0], -1)


def _half(block: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(block).view("<f2").astype(np.float32)


def _q8_0(block: np.ndarray) -> np.ndarray:
    return block[:, 2:].view(np.int8).astype(np.float32) * _half(block[:, :2])


def _q4_0(block: np.ndarray) -> np.ndarray:
    codes = np.concatenate([block[:, 2:] & 15, block[:, 2:] >> 4], axis=1).astype(np.float32)
    return _half(block[:, :2]) * (codes - np.float32(8))


def _q6_k(block: np.ndarray) -> np.ndarray:
    count = block.shape[0]
    low = block[:, :128].reshape(count, 2, 2, 32)
    high = block[:, 128:192].reshape(count, 2, 32)
    codes = np.empty((count, 2, 4, 32), np.uint8)
    for run in range(4):
        codes[:, :, run] = (low[:, :, run % 2] >> 4 * (run // 2) & 15) | (high >> 2 * run & 3) << 4
    scales = _half(block[:, 208:]) * block[:, 192:208].view(np.int8).astype(np.float32)
    return (scales[..., None] * (codes.reshape(count, 16, 16).astype(np.float32) - np.float32(32))).reshape(count, 256)


def _q4_k(block: np.ndarray) -> np.ndarray:
    count, packed = block.shape[0], block[:, 4:16].reshape(-1, 3, 4)
    low, top, rest = packed[:, 0], packed[:, 1], packed[:, 2]
    scale = np.concatenate([low & 63, (rest & 15) | (low >> 6) << 4], axis=1).astype(np.float32)
    offset = np.concatenate([top & 63, (rest >> 4) | (top >> 6) << 4], axis=1).astype(np.float32)
    codes = block[:, 16:].reshape(count, 4, 1, 32) >> np.array([0, 4], np.uint8)[:, None] & 15
    scale, offset = _half(block[:, :2]) * scale, _half(block[:, 2:4]) * offset
    return (scale[..., None] * codes.reshape(count, 8, 32).astype(np.float32) - offset[..., None]).reshape(count, 256)


_DECODERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q6_K": _q6_k,
    "Q4_K": _q4_k,
}
