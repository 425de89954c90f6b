"""Scales of ggml's blocks -> the scale of a TernaryTensor: one for the tensor, one a row, or one for 128 columns.

A block without a weight that counts (all of it 0) may have any scale. Where all others agree, their scale is the
tensor's or the row's: a model of one scale stays one, whatever blocks it was cut into.
"""

from __future__ import annotations

import numpy as np

from bitnet_mlx.errors import FormatError, UnsupportedModelError
from bitnet_mlx.ternary import CODES_PER_WORD, GROUP, MIN_SCALE, ZERO_WORD

_ROWS_AT_ONCE = 1 << 16  # words


def used_blocks(words: np.ndarray, block: int, blocks: int) -> np.ndarray:
    """Which blocks of `block` columns hold a weight that is not 0: words2 [N, ...] -> bool [N, blocks]."""
    n, per_block = words.shape[0], block // CODES_PER_WORD
    used = np.empty((n, blocks), bool)
    step = max(1, _ROWS_AT_ONCE // max(words.shape[1], 1))
    for start in range(0, n, step):
        rows = words[start : start + step, : blocks * per_block]
        used[start : start + step] = (rows.reshape(rows.shape[0], blocks, per_block) != ZERO_WORD).any(axis=2)
    return used


def collapse(d: np.ndarray, words: np.ndarray, block: int, name: str) -> np.ndarray:
    """float32 d [N, K / block] of words2 [N, padded(K) / 16] -> float32 scale [], [N] or [N, padded(K) / 128].

    block: 64, 128 or 256 columns. name: the tensor, for messages. Raises FormatError for a scale that is not finite,
    negative, or 0 under weights that are not; UnsupportedModelError where two blocks of 64 in one group of 128 differ.
    """
    blocks = d.shape[1]
    if not np.isfinite(d).all():
        row, column = (int(i) for i in np.argwhere(~np.isfinite(d))[0])
        raise FormatError(
            f"[scales] tensor {name}: the scale of row {row}, block {column} is {d[row, column]}; it is damaged"
        )
    used = used_blocks(words, block, blocks)
    wrong = (d < 0) | (used & (d == 0))
    if wrong.any():
        row, column = (int(i) for i in np.argwhere(wrong)[0])
        raise FormatError(
            f"[scales] tensor {name}: the scale of row {row}, block {column} is {d[row, column]}; "
            "a scale must be above 0 where weights are not all 0"
        )
    top = np.where(used, d, np.float32(0)).max(axis=1, initial=0)
    if not ((d != top[:, None]) & used).any():
        live = top[top > 0]
        if live.size == 0:
            return np.asarray(MIN_SCALE, np.float32)
        return np.asarray(live[0], np.float32) if (live == live[0]).all() else np.where(top > 0, top, MIN_SCALE)
    return _groups(d, used, words.shape[1] * CODES_PER_WORD // GROUP, block, name)


def _groups(d: np.ndarray, used: np.ndarray, groups: int, block: int, name: str) -> np.ndarray:
    n, blocks = d.shape
    if block >= GROUP:
        scale = np.repeat(np.where(used, d, np.float32(0)), block // GROUP, axis=1)
        return np.pad(scale, ((0, 0), (0, groups - scale.shape[1])))
    per_group = GROUP // block
    wide = np.zeros((n, groups * per_group), np.float32)
    wide[:, :blocks] = np.where(used, d, np.float32(0))
    wide = wide.reshape(n, groups, per_group)
    scale = wide.max(axis=2)
    differ = (wide != scale[..., None]) & (wide > 0)
    if differ.any():
        row, group, _ = (int(i) for i in np.argwhere(differ)[0])
        raise UnsupportedModelError(
            f"[scales] tensor {name} has a scale for each {block} columns, and they differ inside a group of {GROUP} "
            f"(row {row}, columns {group * GROUP} on); one scale for {GROUP} columns is supported"
        )
    return scale
