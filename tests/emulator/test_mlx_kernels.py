"""Proof that the emulator can be trusted: MLX's own quantised kernels, from the installed headers, give MLX's own results."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from tests.emulator import emulate
from tests.emulator.probe import launch

HEADER = """
#include "mlx/backend/metal/kernels/steel/gemm/gemm.h"
#include "mlx/backend/metal/kernels/quantized_utils.h"
#include "mlx/backend/metal/kernels/quantized.h"
"""
VECTOR = """
    const constant int* ints = nullptr;
    const constant int64_t* longs = nullptr;
    KERNEL<T, GROUP, 2, false>(w, scales, biases, x, y, sizes[0], sizes[1], sizes[2], ints, longs, sizes[2], ints, longs, longs,
                               longs, threadgroup_position_in_grid, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
"""
MATRIX = """
    const constant int* ints = nullptr;
    const constant int64_t* longs = nullptr;
    affine_qmm_t<T, GROUP, 2, ALIGNED, false>(w, scales, biases, x, y, sizes[0], sizes[1], sizes[2], sizes[3], ints, longs,
                                              sizes[3], ints, longs, longs, longs, threadgroup_position_in_grid,
                                              thread_index_in_threadgroup, simdgroup_index_in_threadgroup,
                                              thread_index_in_simdgroup);
"""


def case(m, n, k, group, dtype):
    """Whole numbers small enough that float16 holds every sum, and the product by numpy and by MLX's CPU."""
    rng = np.random.default_rng((m, n, k))
    top = 3 if dtype == "float32" else 1
    x = rng.integers(-top, top + 1, (m, k)).astype(np.float32)
    codes = rng.integers(0, 4, (n, k)).astype(np.uint32)
    scales = rng.choice([1.0, 2.0], (n, k // group)).astype(np.float32)
    biases = rng.choice([-1.0, -2.0], (n, k // group)).astype(np.float32)
    weights = codes * np.repeat(scales, group, 1) + np.repeat(biases, group, 1)
    shifts = 2 * np.arange(16, dtype=np.uint32)
    w = (codes.reshape(n, -1, 16) << shifts).sum(axis=2).astype(np.uint32)
    expected = x.astype(np.float64) @ weights.astype(np.float64).T
    assert np.abs(expected).max() < 2048
    stock = mx.quantized_matmul(
        mx.array(x), mx.array(w), mx.array(scales), mx.array(biases), group_size=group, bits=2, stream=mx.cpu
    )
    np.testing.assert_array_equal(np.array(stock), expected)
    return {"w": w, "scales": scales.astype(dtype), "biases": biases.astype(dtype), "x": x.astype(dtype)}, expected


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize(
    ("name", "n", "k"), [("affine_qmv_fast", 16, 1024), ("affine_qmv", 13, 384), ("affine_qmv", 3, 512)]
)
def test_mat_vec(name, n, k, group, dtype):
    inputs, expected = case(2, n, k, group, dtype)
    inputs["sizes"] = np.array([k, n, 0], np.int32)
    made = launch(
        VECTOR.replace("KERNEL", name), inputs, {"y": ((2, n), dtype)}, grid=(2 * 32, -(-n // 8) * 2, 1), threadgroup=(32, 2, 1),
        header=HEADER, T=dtype, GROUP=group,
    )  # fmt: skip
    np.testing.assert_array_equal(emulate(made)[0], expected)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize(("m", "n", "k"), [(33, 64, 256), (32, 37, 128), (5, 3, 512)])
def test_matrix_product(m, n, k, group, dtype):
    inputs, expected = case(m, n, k, group, dtype)
    inputs["sizes"] = np.array([k, n, m, 0], np.int32)
    made = launch(
        MATRIX, inputs, {"y": ((m, n), dtype)}, grid=(-(-n // 32) * 32, -(-m // 32) * 2, 2), threadgroup=(32, 2, 2),
        header=HEADER, T=dtype, GROUP=group, ALIGNED=n % 32 == 0,
    )  # fmt: skip
    np.testing.assert_array_equal(emulate(made)[0], expected)
