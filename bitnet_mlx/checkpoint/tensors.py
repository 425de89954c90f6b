"""One tensor of a file -> what runs: checks of dtype, shape and values, then a view of the file or a conversion.

Every FormatError names the tensor, the file, what was found and what was needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from bitnet_mlx.checkpoint.folder import TensorTable
from bitnet_mlx.checkpoint.pages import release
from bitnet_mlx.errors import FormatError
from bitnet_mlx.formats import hf, trits5, words2
from bitnet_mlx.formats.dense import HEAD_GROUP, DenseRows, GroupedRows, bfloat16_to_float32, quantize_rows
from bitnet_mlx.formats.strict_json import shown
from bitnet_mlx.ternary import CODES_PER_WORD, GROUP, TernaryTensor, padded

FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Unsigned integer of the same size, and the exponent bits, which are all set in infinities and NaNs alone.
_EXPONENT = {"F32": (np.uint32, 0x7F800000), "F16": (np.uint16, 0x7C00), "BF16": (np.uint16, 0x7F80)}
_AT_ONCE = 1 << 18  # values converted at a time, about 1 MB as float32


def damaged(table: TensorTable, name: str, text: str) -> FormatError:
    """A FormatError about one tensor."""
    return FormatError(f"[checkpoint] {table.path(name)}: tensor {shown(table.label(name))} {text}")


def expect(table: TensorTable, name: str, dtypes: tuple[str, ...], shapes: tuple[tuple[int, ...], ...]) -> np.ndarray:
    """A view of the tensor, which must have one of the dtypes and shapes."""
    info = table.info(name)
    if info.dtype not in dtypes or info.shape not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        raise damaged(
            table, name, f"is {info.dtype} {shown(list(info.shape))}; {' or '.join(dtypes)} {wanted} is needed"
        )
    array = table.array(name)
    # A file may put data at odd offsets; what reads the array later may not.
    return array if array.flags.aligned else array.copy()


def check_finite(table: TensorTable, name: str, array: np.ndarray) -> None:
    """Raise FormatError if a float tensor holds NaN or infinity."""
    if not finite(array, table.info(name).dtype, table.one_pass):
        raise damaged(table, name, "holds NaN or infinity; only finite values are allowed. The file is damaged")


def finite(array: np.ndarray, dtype: str, one_pass: bool = False) -> bool:
    """Whether floats ("F32", "F16", or "BF16" as uint16) are all finite; one pass in blocks.

    one_pass: the pages of a mapped file may leave memory behind it.
    """
    kind, exponent = _EXPONENT[dtype]
    bits = array.reshape(-1).view(kind)
    for start in range(0, bits.size, _AT_ONCE):
        block = bits[start : start + _AT_ONCE]
        if (block & kind(exponent)).max() == exponent:
            return False
        if one_pass:
            release(block)
    return True


def as_float32(array: np.ndarray, dtype: str) -> np.ndarray:
    """Values of a float tensor as float32; dtype is the file's name for it."""
    return bfloat16_to_float32(array) if dtype == "BF16" else array.astype(np.float32)


def vector(table: TensorTable, name: str, size: int) -> np.ndarray:
    """A norm or a bias: finite floats [size] -> float32."""
    array = expect(table, name, tuple(FLOATS), ((size,),))
    check_finite(table, name, array)
    return as_float32(array, table.info(name).dtype)


def dense(table: TensorTable, name: str, shape: tuple[int, int]) -> DenseRows:
    """A float matrix used in place."""
    array = expect(table, name, tuple(FLOATS), (shape,))
    check_finite(table, name, array)
    return DenseRows(array, FLOATS[table.info(name).dtype])


def row_blocks(array: np.ndarray) -> Iterator[slice]:
    """Slices of rows of about _AT_ONCE values."""
    step = max(1, _AT_ONCE // max(array.shape[1], 1))
    for start in range(0, array.shape[0], step):
        yield slice(start, min(start + step, array.shape[0]))


def packed(table: TensorTable, module: str, shape: tuple[int, int], divide: bool) -> TernaryTensor:
    """Hugging Face's packed bytes and weight_scale; w = t / weight_scale where `divide`, else t * weight_scale.

    Ternary values that were never packed (floats -1, 0 and 1 with a weight_scale to multiply) are read as well.
    """
    n, k = shape
    name = f"{module}.weight"
    info = table.info(name)
    scale = packed_scale(table, f"{module}.weight_scale", n, divide)
    if info.dtype in FLOATS and info.shape == shape and not divide:
        return TernaryTensor(_pack_floats(table, name), scale, shape)
    if info.dtype in FLOATS:
        raise damaged(
            table,
            name,
            f"is {info}; the config promises packed weights, U8 {[hf.packed_rows(n), k]}. If these are master weights, "
            'its quantization_config lacks "linear_class": "autobitlinear" and "quantization_mode": "online"',
        )
    array = expect(table, name, ("U8",), ((hf.packed_rows(n), k),))
    words = hf.to_words2(array, n, f"{table.label(name)} in {table.path(name)}")
    table.release(name)
    return TernaryTensor(words, scale, shape)


def packed_scale(table: TensorTable, name: str, n: int, divide: bool) -> np.ndarray:
    """weight_scale [1], [] or [N] -> float32 [] or [N], what a weight of 1 stands for."""
    array = expect(table, name, tuple(FLOATS), ((1,), (), (n,)))
    check_finite(table, name, array)
    scale = as_float32(array, table.info(name).dtype)
    if scale.size == 1:
        scale = scale.reshape(())
    # A subnormal scale has no finite inverse.
    smallest = np.finfo(np.float32).tiny if divide else np.float32(0)
    if not np.all(scale > smallest):
        raise damaged(table, name, f"is {float(scale.min())}; a scale must be above 0. The file is damaged")
    return np.asarray(np.float32(1) / scale if divide else scale, np.float32)


def _pack_floats(table: TensorTable, name: str) -> np.ndarray:
    array = table.array(name)
    dtype = table.info(name).dtype
    words = np.empty((array.shape[0], padded(array.shape[1]) // CODES_PER_WORD), np.uint32)
    for part in row_blocks(array):
        values = as_float32(array[part], dtype)
        t = np.where(np.abs(values) <= 1, values, 9).astype(np.int8)  # NaN too becomes 9
        if np.any(t != values):
            raise damaged(
                table,
                name,
                "is float and holds values besides -1, 0 and 1, though the config promises quantised weights. If these "
                'are master weights, its quantization_config lacks "quantization_mode": "online"',
            )
        words[part] = words2.pack(t)
    table.release(name)
    return words


def native(
    table: TensorTable, module: str, shape: tuple[int, int], activation_bits: int, storage: str = "words2"
) -> TernaryTensor:
    """words2 as it lies in the file, or trits5 unpacked to words2."""
    n, k = shape
    name, scale_name = f"{module}.weight", f"{module}.weight_scale"
    width, codec = (trits5.width(k), trits5) if storage == "trits5" else (padded(k) // CODES_PER_WORD, words2)
    words = expect(table, name, ("U32",), ((n, width),))
    codec.check(words, k, f"{table.label(name)} in {table.path(name)}")
    if storage == "trits5":
        words = trits5.to_words2(words, k)
        table.release(name)
    scale = expect(table, scale_name, ("F32",), ((), (n,), (n, padded(k) // GROUP)))
    check_finite(table, scale_name, scale)
    # A group of zeros may have any scale, 0 too; a whole row or tensor of scale 0 is a fault.
    if not np.all(scale >= 0 if scale.ndim == 2 else scale > 0):
        raise damaged(table, scale_name, f"is {float(scale.min())}; a scale must be above 0. The file is damaged")
    return TernaryTensor(words, scale, shape, activation_bits)


def grouped(table: TensorTable, module: str, shape: tuple[int, int], bits: int) -> GroupedRows:
    """An embedding or head of small integers with a scale for each 64 columns, in place."""
    n, k = shape
    name, scale_name = f"{module}.weight", f"{module}.weight_scale"
    codes = expect(table, name, ("I8",), (shape,))
    top = 2 ** (bits - 1) - 1
    if codes.size and (codes.min() < -top or codes.max() > top):
        raise damaged(table, name, f"holds codes from {codes.min()} to {codes.max()}; {bits} bits hold -{top} to {top}")
    scales = expect(table, scale_name, ("F32",), ((n, -(-k // HEAD_GROUP)),))
    check_finite(table, scale_name, scales)
    if np.any(scales < 0):
        raise damaged(table, scale_name, f"holds {float(scales.min())}; a scale cannot be below 0")
    return GroupedRows(codes, scales, bits)


class HasRows(Protocol):
    """A matrix [N, K] whose rows can be had as float32."""

    @property
    def shape(self) -> tuple[int, int]: ...
    def rows(self, index: slice) -> np.ndarray: ...


def quantize_in_blocks(rows: HasRows, bits: int, advance: Callable[[int], None] | None = None) -> GroupedRows:
    """formats.dense.quantize_rows over blocks of rows, so that the float32 copy stays small.

    advance: called with the rows done so far.
    """
    n, k = rows.shape
    codes = np.empty((n, k), np.int8)
    scales = np.empty((n, -(-k // HEAD_GROUP)), np.float32)
    for part in row_blocks(codes):
        done = quantize_rows(rows.rows(part), bits)
        codes[part], scales[part] = done.codes, done.scales
        if advance:
            advance(part.stop)
    return GroupedRows(codes, scales, bits)
