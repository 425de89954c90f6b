"""bfloat16 bits and grouped rows against MLX, which owns both formats."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from bitnet_mlx.errors import FormatError
from bitnet_mlx.formats.dense import DenseRows, GroupedRows, bfloat16_to_float32, float32_to_bfloat16, quantize_rows


def test_bfloat16_rounds_as_mlx_does() -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 20000, dtype=np.uint32)
    bits = bits[(bits & np.uint32(0x7F800000)) != np.uint32(0x7F800000)]  # NaN has many spellings
    x = np.concatenate([bits.view(np.float32), np.array([0.0, -0.0, np.inf, -np.inf, 3.39e38], np.float32)])
    ours = bfloat16_to_float32(float32_to_bfloat16(x))
    theirs = np.array(mx.array(x).astype(mx.bfloat16).astype(mx.float32))
    assert np.array_equal(ours, theirs)


def test_bfloat16_keeps_nan() -> None:
    assert np.isnan(bfloat16_to_float32(float32_to_bfloat16(np.array([np.nan], np.float32)))).all()
    low = np.array([0x7F800001], np.uint32).view(np.float32)  # a NaN whose upper half looks like infinity
    assert np.isnan(bfloat16_to_float32(float32_to_bfloat16(low))).all()


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_grouped_rows_are_within_half_a_step(bits: int) -> None:
    w = np.random.default_rng(bits).standard_normal((7, 200)).astype(np.float32)
    rows = quantize_rows(w, bits)
    step = np.repeat(rows.scales, 64, axis=1)[:, :200]
    assert np.all(np.abs(rows.rows(slice(None)) - w) <= step * 0.5001)
    assert np.abs(rows.codes).max() == 2 ** (bits - 1) - 1


def test_grouped_rows_of_zeros_stay_zero() -> None:
    rows = quantize_rows(np.zeros((2, 64), np.float32), 8)
    assert not rows.codes.any() and not rows.rows(slice(None)).any()


def test_grouped_rows_refuse_other_bits_and_shapes() -> None:
    with pytest.raises(FormatError, match="8, 6 or 4"):
        quantize_rows(np.zeros((2, 64), np.float32), 5)
    codes, scales = np.zeros((2, 65), np.int8), np.zeros((2, 2), np.float32)
    assert GroupedRows(codes, scales).shape == (2, 65)
    for wrong in ((codes, scales[:, :1]), (codes.view(np.uint8), scales), (codes, scales.astype(np.float64))):
        with pytest.raises(FormatError, match="needed"):
            GroupedRows(*wrong)


def test_dense_rows_refuse_a_dtype_that_is_not_named() -> None:
    for data, name in (
        (np.zeros((2, 2), np.float64), "float64"),
        (np.zeros((2, 2), np.float32), "bfloat16"),
        (np.zeros((2, 2), np.uint16), "float16"),
        (np.zeros(4, np.float32), "float32"),
    ):
        with pytest.raises(FormatError, match="float32, float16 or bfloat16"):
            DenseRows(data, name)
