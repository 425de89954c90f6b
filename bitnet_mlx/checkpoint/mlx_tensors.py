"""MLX's 2-bit affine form of ternary weights: w = scale * code + bias with bias = -scale, so that code = t + 1.

The words are this package's own, so a weight of whole groups of 128 columns is used where it lies.
"""

from __future__ import annotations

import numpy as np

from bitnet_mlx.checkpoint.folder import TensorTable
from bitnet_mlx.checkpoint.tensors import FLOATS, as_float32, check_finite, damaged, expect, row_blocks
from bitnet_mlx.formats import affine as affine_layout
from bitnet_mlx.formats import words2
from bitnet_mlx.formats.block_scales import collapse
from bitnet_mlx.formats.dense import HEAD_GROUP, GroupedRows
from bitnet_mlx.ternary import CODES_PER_WORD, GROUP, ZERO_WORD, TernaryTensor, padded

PARTS = ("weight", "scales", "biases")


def affine(table: TensorTable, module: str, shape: tuple[int, int], group: int, activation_bits: int) -> TernaryTensor:
    """The weight of a module. group: columns that share a scale, 64 or 128.

    Raises FormatError for code 3, for a bias that is not -scale (the weights are not ternary then) and for damage.
    """
    n, k = shape
    name, scale_name, bias_name = (f"{module}.{part}" for part in PARTS)
    if k % group:
        raise damaged(table, name, f"has {k} columns, which are no whole number of groups of {group}")
    words = expect(table, name, ("U32",), ((n, k // CODES_PER_WORD),))
    scale, bias = (_floats(table, part, (n, k // group)) for part in (scale_name, bias_name))
    wrong = bias != -scale
    if wrong.any():
        row, column = (int(i) for i in np.argwhere(wrong)[0])
        raise damaged(
            table,
            bias_name,
            f"is {bias[row, column]:g} in row {row}, group {column}, whose scale is {scale[row, column]:g}; a ternary "
            "weight has bias -scale. MLX's own quantiser does not keep ternary weights: convert the original checkpoint",
        )
    words = _signed(words, scale, group)
    if k % GROUP:
        words = np.pad(words, ((0, 0), (0, padded(k) // CODES_PER_WORD - words.shape[1])), constant_values=ZERO_WORD)
    words2.check(words, k, f"{table.label(name)} in {table.path(name)}")
    d = collapse(np.abs(scale), words, group, table.label(name))
    return TernaryTensor(words, d, shape, activation_bits)


def grouped(table: TensorTable, module: str, shape: tuple[int, int], bits: int) -> GroupedRows:
    """An embedding or head of 8, 6 or 4 bits in groups of 64, whose bias puts the weight 0 in the middle of the codes.

    Raises FormatError for other biases, which MLX's own quantiser writes, and for damage.
    """
    n, k = shape
    name, scale_name, bias_name = (f"{module}.{part}" for part in PARTS)
    if k % HEAD_GROUP:
        raise damaged(table, name, f"has {k} columns, which are no whole number of groups of {HEAD_GROUP}")
    words = expect(table, name, ("U32",), ((n, k * bits // 32),))
    scales, biases = (_floats(table, part, (n, k // HEAD_GROUP)) for part in (scale_name, bias_name))
    middle = 1 << (bits - 1)
    if np.any(scales < 0) or np.any(biases != scales * np.float32(-middle)):
        raise damaged(
            table,
            bias_name,
            f"is not {-middle} times the scale everywhere, so zero is not among the codes; such tables are not read. "
            "Convert the original checkpoint",
        )
    codes = np.empty(shape, np.int8)
    for part in row_blocks(codes):
        codes[part] = affine_layout.unpack(words[part], bits)
        if codes[part].min(initial=0) == -middle:
            raise damaged(table, name, f"holds the code 0, which stands for {-middle} and is never written")
    table.release(name)
    return GroupedRows(codes, scales, bits)


def _floats(table: TensorTable, name: str, shape: tuple[int, int]) -> np.ndarray:
    array = expect(table, name, tuple(FLOATS), (shape,))
    check_finite(table, name, array)
    return as_float32(array, table.info(name).dtype)


def _signed(words: np.ndarray, scale: np.ndarray, group: int) -> np.ndarray:
    """Words whose groups have scales above 0: a negative scale turns codes 0 and 2 round, a scale of 0 makes all 1.

    Code 3 stays 3 under a scale other than 0.
    """
    odd = scale <= 0
    if not odd.any():
        return words
    out = words.copy()
    per_group = group // CODES_PER_WORD
    blocks = out.reshape(*scale.shape, per_group)
    negative, zero = scale < 0, scale == 0
    w = blocks[negative]
    low, high = w & ZERO_WORD, w >> np.uint32(1) & ZERO_WORD
    blocks[negative] = low | ((high ^ ~low) & ZERO_WORD) << np.uint32(1)
    blocks[zero] = ZERO_WORD
    return out
