"""Q2_0: a float16 scale d, then 2-bit codes of a group of weights along K, four neighbours a byte, low bits first.

w = (code - 1) * d. A group has 128 weights (34 bytes) in older files and 64 (18 bytes) in newer ones under the same type
number, so the group is found from the bytes that a tensor has.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bitnet_mlx.errors import FormatError
from bitnet_mlx.formats import fields
from bitnet_mlx.ternary import CODES_PER_WORD, padded

GROUPS = (128, 64)
_AT_ONCE = 1 << 20  # weights converted at a time


def nbytes(n: int, k: int, group: int) -> int:
    """Bytes of a tensor."""
    return n * (k // group) * (2 + group // 4)


def possible_groups(n: int, k: int, room: int, alignment: int) -> tuple[int, ...]:
    """The groups that a tensor of this shape can have where the next one starts `room` bytes on: its padding is shorter
    than the alignment."""
    return tuple(g for g in GROUPS if k % g == 0 and 0 <= room - nbytes(n, k, g) < alignment)


def to_words2(data: np.ndarray, k: int, group: int, name: str = "weight") -> tuple[np.ndarray, np.ndarray]:
    """uint8 [N, K / group * (2 + group / 4)] -> (words2 uint32 [N, padded(K) / 16], scales float32 [N, K / group]).

    name: the tensor, for messages. Raises FormatError on another dtype or shape and on code 3, which would be 2 d.
    """
    if group not in GROUPS or k % group:
        raise FormatError(f"[Q2_0] tensor {name}: rows of {k} weights do not divide into groups of {group}")
    size, groups = 2 + group // 4, k // group
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != groups * size:
        raise FormatError(
            f"[Q2_0] tensor {name} is {data.dtype} {data.shape}; rows of {k} weights in groups of {group} are "
            f"uint8 [N, {groups * size}]"
        )
    n = data.shape[0]
    words = np.full((n, padded(k) // CODES_PER_WORD), 0x55555555, np.uint32)
    scales = np.empty((n, groups), np.float32)
    for part in _row_blocks(n, k):
        block = data[part].reshape(-1, size)
        scales[part] = np.ascontiguousarray(block[:, :2]).view("<f2").astype(np.float32).reshape(-1, groups)
        codes = np.ascontiguousarray(block[:, 2:]).view("<u4").astype(np.uint32, copy=False)
        three = fields.first_three(codes)
        if three is not None:
            row = part.start + three // (k // 4)
            raise FormatError(f"[Q2_0] tensor {name} holds code 3 in row {row}; codes are 0, 1 and 2 (t + 1)")
        words[part, : k // CODES_PER_WORD] = codes.reshape(-1, k // CODES_PER_WORD)
    return words, scales


def from_words2(words: np.ndarray, scales: np.ndarray, k: int, group: int) -> np.ndarray:
    """words2 and scales float32 [N, K / group], which float16 holds exactly -> uint8 [N, K / group * (2 + group / 4)]."""
    n, groups = scales.shape
    out = np.empty((n, groups, 2 + group // 4), np.uint8)
    out[..., :2] = scales.astype("<f2")[..., None].view(np.uint8)
    codes = np.ascontiguousarray(words[:, : k // CODES_PER_WORD]).astype("<u4", copy=False)
    out[..., 2:] = codes.view(np.uint8).reshape(n, groups, group // 4)
    return out.reshape(n, -1)


def _row_blocks(n: int, k: int) -> Iterator[slice]:
    step = max(1, _AT_ONCE // max(k, 1))
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))
