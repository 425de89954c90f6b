"""Matrices that are not ternary: plain rows, and rows in groups of 64 with one scale a group.

Both have `.shape` (N, K), `.nbytes` and `.rows(index)` -> float32 [.., K], as TernaryTensor has.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bitnet_mlx.errors import FormatError

HEAD_GROUP = 64
_STORAGE = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    """uint16 bfloat16 bit patterns -> float32 of the same shape, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 -> uint16 bfloat16 bit patterns, rounded half to even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)))
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return (np.where(nan, bits | np.uint32(0x400000), rounded) >> np.uint32(16)).astype(np.uint16)


@dataclass(frozen=True)
class DenseRows:
    """A float matrix [N, K] as it lies in its file. `dtype` names the storage; bfloat16 is held as uint16 bit patterns."""

    data: np.ndarray
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in _STORAGE or self.data.dtype != _STORAGE[self.dtype] or self.data.ndim != 2:
            raise FormatError(
                f"[DenseRows] data is {self.data.dtype} {self.data.shape} under the name {self.dtype}; "
                "a matrix of float32, float16 or bfloat16 (as uint16) is needed"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.shape  # type: ignore[return-value]

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def rows(self, index: np.ndarray | slice) -> np.ndarray:
        """The chosen rows as float32 [.., K]."""
        chosen = self.data[index]
        return bfloat16_to_float32(chosen) if self.dtype == "bfloat16" else chosen.astype(np.float32)


@dataclass(frozen=True)
class GroupedRows:
    """A matrix of small integers [N, K] with one float32 scale for each 64 columns and no zero point: w = code * scale.

    codes: int8 [N, K], within +-(2^(bits-1) - 1). scales: float32 [N, ceil(K / 64)]. bits: 8, 6 or 4.
    As MLX affine: unsigned code + 2^(bits-1), scale s, bias -2^(bits-1) * s.
    """

    codes: np.ndarray
    scales: np.ndarray
    bits: int = 8

    def __post_init__(self) -> None:
        n, k = self.codes.shape
        if (
            self.codes.dtype != np.int8
            or self.scales.dtype != np.float32
            or self.scales.shape != (n, -(-k // HEAD_GROUP))
        ):
            raise FormatError(
                f"[GroupedRows] codes are {self.codes.dtype} {self.codes.shape} and scales {self.scales.dtype} "
                f"{self.scales.shape}; int8 [N, K] with float32 [N, ceil(K / {HEAD_GROUP})] are needed"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape  # type: ignore[return-value]

    @property
    def nbytes(self) -> int:
        """Bytes as held here: one a code, whatever `bits` says, and the scales."""
        return self.codes.nbytes + self.scales.nbytes

    def rows(self, index: np.ndarray | slice) -> np.ndarray:
        """The chosen rows as float32 [.., K]."""
        k = self.codes.shape[1]
        return self.codes[index].astype(np.float32) * np.repeat(self.scales[index], HEAD_GROUP, axis=-1)[..., :k]


def quantize_rows(w: np.ndarray, bits: int) -> GroupedRows:
    """float32 [N, K] -> GroupedRows: scale = max|w| of each 64 columns / (2^(bits-1) - 1), codes rounded half to even."""
    if bits not in (8, 6, 4):
        raise FormatError(f"[quantize_rows] bits is {bits}; 8, 6 or 4 are allowed")
    n, k = w.shape
    top = 2 ** (bits - 1) - 1
    wide = np.zeros((n, -(-k // HEAD_GROUP) * HEAD_GROUP), np.float32)
    wide[:, :k] = w
    groups = wide.reshape(n, -1, HEAD_GROUP)
    scales = np.abs(groups).max(axis=2) / np.float32(top)
    # A group of zeros has scale 0: its codes are 0.
    safe = np.where(scales > 0, scales, np.float32(1))
    codes = np.clip(np.rint(groups / safe[..., None]), -top, top).astype(np.int8)
    return GroupedRows(np.ascontiguousarray(codes.reshape(n, -1)[:, :k]), scales, bits)
