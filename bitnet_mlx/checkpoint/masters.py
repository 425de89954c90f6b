"""Float master weights -> ternary, exactly as ternary.ternarize does it, in blocks of rows.

A 16-bit float has 65,536 values, so a count of each tells the mean, the codes and the error of the whole tensor, and a
weight becomes a code by comparing its bits with one threshold: 16-bit floats of one sign are in the order of their bits.
"""

from __future__ import annotations

import numpy as np

from bitnet_mlx.checkpoint.folder import TensorTable
from bitnet_mlx.checkpoint.tensors import FLOATS, as_float32, check_finite, damaged, expect, row_blocks
from bitnet_mlx.formats import words2
from bitnet_mlx.ternary import CODES_PER_WORD, MIN_SCALE, TernaryTensor, matmul, padded, ternarize

SAMPLE, SAMPLES = 1 << 16, 4  # weights looked at, and in how many stretches


def online(table: TensorTable, module: str, shape: tuple[int, int]) -> tuple[TernaryTensor, float]:
    """The ternary weight and its relative error, |W - t m| / |W| in the Euclidean norm (0 for a weight of zeros).

    Where the weight is rows of a larger matrix, that one is ternarised as a whole: it was trained as one.
    """
    name = f"{module}.weight"
    array = expect(table, name, tuple(FLOATS), (shape,))
    rows = table.rows(name)
    if rows is not None:
        array, part = table.whole(name), shape
        shape = (array.shape[0], array.shape[1])
    dtype = table.info(name).dtype
    if dtype == "F32":
        check_finite(table, name, array)
        found = _from_float32(array, shape)
    else:
        found = _from_16_bits(array.view(np.uint16), dtype, shape)
    if found is None:
        raise damaged(table, name, "holds NaN or infinity; only finite values are allowed. The file is damaged")
    table.release(name)
    words, m, error = found
    if rows is not None:
        words, shape = np.ascontiguousarray(words[rows]), part
    return TernaryTensor(words, np.asarray(m, np.float32), shape), error


def sampled_zeros(table: TensorTable, module: str, shape: tuple[int, int]) -> float:
    """About the share of zeros that the weight will have, from a few stretches of its rows: to look at a large model."""
    name = f"{module}.weight"
    array = expect(table, name, tuple(FLOATS), (shape,))
    rows = max(1, SAMPLE // SAMPLES // shape[1])
    starts = np.linspace(0, max(shape[0] - rows, 0), SAMPLES).astype(int) if shape[0] > SAMPLES * rows else [0]
    step = rows if len(starts) > 1 else shape[0]
    sample = np.concatenate([as_float32(array[start : start + step], table.info(name).dtype) for start in starts])
    table.release(name)
    return float((ternarize(sample)[0] == 0).mean())


def _from_16_bits(bits: np.ndarray, dtype: str, shape: tuple[int, int]) -> tuple[np.ndarray, np.float32, float] | None:
    """uint16 [N, K] -> words2, scale, error; None where a value is not finite."""
    counts = np.zeros(1 << 16, np.int64)
    for part in row_blocks(bits):
        counts += np.bincount(bits[part].reshape(-1), minlength=1 << 16)
    there = np.flatnonzero(counts).astype(np.uint16)
    values = as_float32(there if dtype == "BF16" else there.view(np.float16), dtype)
    if not np.isfinite(values).all():
        return None
    count = counts[there].astype(np.float64)
    m = _scale(float(matmul(count, np.abs(values).astype(np.float64))), bits.size)
    inverse = np.float32(1) / m
    positive = np.arange(1 << 15, dtype=np.uint16)
    with np.errstate(invalid="ignore", over="ignore"):
        scaled = as_float32(positive if dtype == "BF16" else positive.view(np.float16), dtype) * inverse
    # rint half to even and the clip: 0.5 goes to 0, and all above it to 1. Infinity passes, so there is a first.
    first = int(np.argmax(scaled > 0.5))
    words = _words(shape)
    for part in row_blocks(bits):
        block = bits[part]
        codes = _codes(block.view(np.int16) >= np.int16(first), block >= np.uint16(first | 1 << 15), shape[1])
        words[part] = words2.pack_codes(codes)
    exact = values.astype(np.float64)
    t = np.sign(exact) * (np.abs(values) * inverse > 0.5)
    return words, m, _error(float(matmul(count, (exact - t * float(m)) ** 2)), float(matmul(count, exact**2)))


def _from_float32(array: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.float32, float]:
    m = _scale(sum(float(np.abs(array[part]).sum(dtype=np.float64)) for part in row_blocks(array)), array.size)
    inverse = np.float32(1) / m
    words, lost, total = _words(shape), 0.0, 0.0
    for part in row_blocks(array):
        block = array[part]
        x = block * inverse
        above, below = x > 0.5, x < -0.5
        words[part] = words2.pack_codes(_codes(above, below, shape[1]))
        lost += float(np.square(block - (above.astype(np.float32) - below) * m).sum(dtype=np.float64))
        total += float(np.square(block).sum(dtype=np.float64))
    return words, m, _error(lost, total)


def _scale(total: float, size: int) -> np.float32:
    return max(np.float32(total / max(size, 1)), MIN_SCALE)


def _error(lost: float, total: float) -> float:
    return (lost / total) ** 0.5 if total else 0.0


def _words(shape: tuple[int, int]) -> np.ndarray:
    return np.empty((shape[0], padded(shape[1]) // CODES_PER_WORD), np.uint32)


def _codes(above: np.ndarray, below: np.ndarray, k: int) -> np.ndarray:
    """bool [N, K] each -> codes uint8 [N, padded(K)]."""
    codes = np.ones((above.shape[0], padded(k)), np.uint8)
    codes[:, :k] += above.view(np.uint8)
    codes[:, :k] -= below.view(np.uint8)
    return codes
