"""Weights that are ternary already and stored as floats: -s, 0 and s, with one s a matrix, a row or 128 columns.

TriLM's (a few magnitudes a matrix, one for each shard of its training) and Bonsai's unpacked files are such.
"""

from __future__ import annotations

import logging

import numpy as np

from bitnet_mlx.checkpoint.folder import TensorTable
from bitnet_mlx.checkpoint.tensors import FLOATS, as_float32, check_finite, damaged, expect, row_blocks
from bitnet_mlx.formats import words2
from bitnet_mlx.formats.block_scales import collapse
from bitnet_mlx.ternary import CODES_PER_WORD, GROUP, TernaryTensor, padded

log = logging.getLogger(__name__)

# Relative distance at most of two magnitudes that count as one: neighbours in float16. In Bonsai's float16 files some
# groups hold two such; bfloat16 is too coarse for that, two different scales may well be neighbours there.
_STEP = {"F32": 0.0, "F16": 2.0**-10, "BF16": 0.0}
_SAMPLED = 16  # rows that tell whether a tensor is ternary


def looks_ternary(table: TensorTable, name: str) -> bool:
    """Whether some rows of a float matrix, spread over it, are ternary and not all 0."""
    return ternary_share(table, name) == 1


def ternary_share(table: TensorTable, name: str) -> float:
    """The share of some rows of a float matrix, spread over it, that are ternary; 0 where they are all 0 or no floats."""
    info = table.info(name)
    if info.dtype not in FLOATS or len(info.shape) != 2 or 0 in info.shape:
        return 0.0
    rows = np.unique(np.linspace(0, info.shape[0] - 1, _SAMPLED).astype(int))
    top, low = _magnitudes(as_float32(table.array(name)[rows], info.dtype))
    if not top.max() > 0:
        return 0.0
    return float((np.isfinite(top) & ~_apart(top, low, info.dtype)).all(axis=1).mean())


def unpacked(table: TensorTable, module: str, shape: tuple[int, int], activation_bits: int) -> TernaryTensor:
    """The weight of a module, exactly; FormatError names the first group of columns with two magnitudes.

    Two magnitudes one rounding step of float16 apart count as one, the more frequent.
    """
    n, k = shape
    name = f"{module}.weight"
    array, dtype = expect(table, name, tuple(FLOATS), (shape,)), table.info(name).dtype
    check_finite(table, name, array)
    words = np.empty((n, padded(k) // CODES_PER_WORD), np.uint32)
    scale = np.empty((n, padded(k) // GROUP), np.float32)
    stepped = 0
    for part in row_blocks(array):
        values = as_float32(array[part], dtype)
        top, low = _magnitudes(values)
        apart = _apart(top, low, dtype)
        if apart.any():
            row, group = (int(i) for i in np.argwhere(apart)[0])
            raise damaged(
                table,
                name,
                f"is not ternary: row {part.start + row} has magnitudes from {low[row, group]:g} to {top[row, group]:g} "
                f"in columns {group * GROUP} to {min((group + 1) * GROUP, k) - 1}, where one is allowed, while the "
                "model's first layer is ternary",
            )
        differ = (low != top) & (top > 0)
        if differ.any():
            stepped += int(differ.sum())
            top = np.where(differ, _frequent(values, top, low), top)
        words[part], scale[part] = words2.pack(np.sign(values).astype(np.int8)), top
    table.release(name)
    if stepped:
        log.info("%s: %d groups hold two magnitudes one rounding step apart; one is used", name, stepped)
    return TernaryTensor(words, collapse(scale, words, GROUP, table.label(name)), shape, activation_bits)


def _grouped(values: np.ndarray) -> np.ndarray:
    """|values| [M, K] -> [M, G, 128], padded with 0."""
    m, k = values.shape
    wide = np.zeros((m, padded(k)), np.float32)
    np.abs(values, out=wide[:, :k])
    return wide.reshape(m, -1, GROUP)


def _magnitudes(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Largest and smallest |value| above 0 of each group, [M, G]; 0 and infinity where all are 0."""
    groups = _grouped(values)
    return groups.max(axis=2), np.where(groups > 0, groups, np.float32(np.inf)).min(axis=2)


def _apart(top: np.ndarray, low: np.ndarray, dtype: str) -> np.ndarray:
    """Groups whose magnitudes differ, in float16 by more than one step."""
    return low < top * np.float32(1 - _STEP[dtype])


def _frequent(values: np.ndarray, top: np.ndarray, low: np.ndarray) -> np.ndarray:
    groups = _grouped(values)
    more = (groups == low[..., None]).sum(axis=2) > (groups == top[..., None]).sum(axis=2)
    return np.where(more, low, top)
