"""Every collective operation and every position against numpy, on small kernels of the tests' own."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from tests.emulator import FaultError, emulate
from tests.emulator.probe import launch

LANES = np.arange(32)
RNG = np.random.default_rng(5)


def outputs(*names, dtype="float32", shape=(32,)):
    return dict.fromkeys(names, (shape, dtype))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int32", "uint32"])
def test_reductions(dtype):
    x = RNG.integers(0, 4, 32).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    body = """
        uint i = thread_index_in_simdgroup;
        sum[i] = simd_sum(x[i]); most[i] = simd_max(x[i]); least[i] = simd_min(x[i]);
        upto[i] = simd_prefix_inclusive_sum(x[i]); before[i] = simd_prefix_exclusive_sum(x[i]);
    """
    made = launch(body, {"x": x}, outputs("sum", "most", "least", "upto", "before", dtype=dtype))
    found = emulate(made, seed=7)
    running = np.cumsum(x.astype(np.int64))
    expected = [running[-1] + 0 * LANES, x.max(), x.min(), running, running - x.astype(np.int64)]
    for y, e in zip(found, expected, strict=True):
        np.testing.assert_array_equal(y.astype(np.int64), np.broadcast_to(np.asarray(e).astype(np.int64), 32))


def test_a_sum_is_taken_in_an_order_of_the_seed():
    x = RNG.standard_normal(32).astype(np.float32)
    made = launch("y[thread_index_in_simdgroup] = simd_sum(x[thread_index_in_simdgroup]);", {"x": x}, outputs("y"))
    found = [emulate(made, seed=seed)[0] for seed in range(8)]
    assert all((y == y[0]).all() for y in found), "lanes differ"
    assert len({float(y[0]) for y in found}) > 1


def test_shuffles():
    x = RNG.integers(-99, 99, 32).astype(np.float32)
    body = """
        uint i = thread_index_in_simdgroup;
        any[i] = simd_shuffle(x[i], ushort((i * 7 + 3) % 32)); across[i] = simd_shuffle_xor(x[i], 5);
        first[i] = simd_broadcast(x[i], 9);
        float down = simd_shuffle_down(x[i], 4), up = simd_shuffle_up(x[i], 4);
        lower[i] = i < 28 ? down : 0.0f; higher[i] = i >= 4 ? up : 0.0f;
        round[i] = simd_shuffle_rotate_down(x[i], 9);
        filled[i] = simd_shuffle_and_fill_down(x[i], -x[i], 4);
        float4 v = simd_shuffle(float4(x[i], i, 1, 2), ushort(31 - i));
        vector[i] = v.x + v.y;
    """
    names = ("any", "across", "first", "lower", "higher", "round", "filled", "vector")
    found = dict(zip(names, emulate(launch(body, {"x": x}, outputs(*names))), strict=True))
    np.testing.assert_array_equal(found["any"], x[(LANES * 7 + 3) % 32])
    np.testing.assert_array_equal(found["across"], x[LANES ^ 5])
    np.testing.assert_array_equal(found["first"], np.full(32, x[9]))
    np.testing.assert_array_equal(found["lower"], np.r_[x[4:], np.zeros(4)])
    np.testing.assert_array_equal(found["higher"], np.r_[np.zeros(4), x[:-4]])
    np.testing.assert_array_equal(found["round"], np.roll(x, -9))
    np.testing.assert_array_equal(found["filled"], np.r_[x[4:], -x[:4]])
    np.testing.assert_array_equal(found["vector"], x[::-1] + LANES[::-1])


def test_votes_and_quads():
    x = RNG.integers(0, 9, 32).astype(np.int32)
    body = """
        uint i = thread_index_in_simdgroup;
        vote[i] = int(ulong(simd_ballot(x[i] > 4))); all[i] = simd_all(x[i] < 9); none[i] = simd_any(x[i] > 8);
        one[i] = simd_is_first(); quad[i] = quad_sum(x[i]); near[i] = quad_shuffle_xor(x[i], 1); both[i] = simd_xor(x[i]);
    """
    names = ("vote", "all", "none", "one", "quad", "near", "both")
    found = dict(zip(names, emulate(launch(body, {"x": x}, outputs(*names, dtype="int32"))), strict=True))
    bits = np.uint32(sum(1 << i for i in range(32) if x[i] > 4)).view(np.int32)
    np.testing.assert_array_equal(found["vote"], np.full(32, bits))
    np.testing.assert_array_equal(found["all"], np.ones(32))
    np.testing.assert_array_equal(found["none"], np.zeros(32))
    np.testing.assert_array_equal(found["one"], LANES == 0)
    np.testing.assert_array_equal(found["quad"], np.repeat(x.reshape(8, 4).sum(1), 4))
    np.testing.assert_array_equal(found["near"], x[LANES ^ 1])
    np.testing.assert_array_equal(found["both"], np.full(32, np.bitwise_xor.reduce(x)))


MATRIX = """
    threadgroup IN staged[8][12];
    uint i = thread_index_in_simdgroup;
    for (uint e = i; e < 64; e += 32) { staged[e / 8][e % 8] = b[e]; }
    for (uint e = i; e < 32; e += 32) { staged[e / 4][8 + e % 4] = IN(0); }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    simdgroup_matrix<IN, 8, 8> left, right, turned;
    simdgroup_matrix<ACC, 8, 8> sum = make_filled_simdgroup_matrix<ACC, 8, 8>(1.0f);
    simdgroup_load(left, a, 8);
    simdgroup_load(right, &staged[0][0], 12);
    simdgroup_load(turned, &staged[0][0], 12, ulong2(0, 0), true);
    simdgroup_multiply_accumulate(sum, left, right, sum);
    simdgroup_store(sum, y, 8);
    simdgroup_multiply(sum, left, turned);
    simdgroup_store(sum, z, 8);
    own[2 * i] = float(left.thread_elements()[0]); own[2 * i + 1] = float(left.thread_elements()[1]);
"""


@pytest.mark.parametrize(
    ("kind", "accumulator"),
    [("float32", "float32"), ("float16", "float32"), ("float16", "float16"), ("bfloat16", "float32")],
)
def test_matrices(kind, accumulator):
    dtype = ml_dtypes.bfloat16 if kind == "bfloat16" else kind
    a, b = (RNG.integers(-4, 5, (8, 8)).astype(dtype) for _ in range(2))
    shapes = {"y": ((8, 8), accumulator), "z": ((8, 8), accumulator), "own": ((64,), "float32")}
    header = "#include <metal_simdgroup_matrix>\n"
    made = launch(MATRIX, {"a": a, "b": b}, shapes, header=header, IN=kind, ACC=accumulator)
    y, z, own = emulate(made)
    whole_a, whole_b = a.astype(np.int64), b.astype(np.int64)
    np.testing.assert_array_equal(y, whole_a @ whole_b + 1)
    np.testing.assert_array_equal(z, whole_a @ whole_b.T)
    row, column = (LANES // 4 & 4) + LANES // 2 % 4, (LANES // 4 & 2) * 2 + LANES % 2 * 2
    np.testing.assert_array_equal(own, np.stack([whole_a[row, column], whole_a[row, column + 1]], 1).reshape(-1))
    with pytest.raises(FaultError, match="no thread has written"):
        emulate(made, edit=("staged[e / 8][e % 8] = b[e]", "if (e != 9) staged[e / 8][e % 8] = b[e]"))


def test_positions_with_parts_of_threadgroups():
    """A grid that is no multiple of the threadgroup, as MLX dispatches it."""
    body = """
        uint3 p = thread_position_in_grid, l = thread_position_in_threadgroup, g = threadgroup_position_in_grid;
        uint3 t = threads_per_threadgroup, n = threadgroups_per_grid, w = threads_per_grid;
        uint at = (p.z * w.y + p.y) * w.x + p.x;
        local_y[at] = l.y * 100 + l.x; group[at] = g.z * 100 + g.y * 10 + g.x; size[at] = t.y * 100 + t.x;
        index[at] = thread_index_in_threadgroup; lane[at] = thread_index_in_simdgroup;
        simd[at] = simdgroup_index_in_threadgroup * 100 + simdgroups_per_threadgroup; count[at] = n.z * 100 + n.y * 10 + n.x;
    """
    names = ("local_y", "group", "size", "index", "lane", "simd", "count")
    shapes = outputs(*names, dtype="uint32", shape=(2, 5, 70))
    made = launch(body, {"x": np.zeros(9, np.float32)}, shapes, grid=(70, 5, 2), threadgroup=(32, 2, 1))
    found = dict(zip(names, emulate(made, seed=2), strict=True))
    z, y, x = np.indices((2, 5, 70))
    wide, high = np.where(x < 64, 32, 6), np.where(y < 4, 2, 1)
    inside = (y % 2) * wide + x % 32
    np.testing.assert_array_equal(found["local_y"], y % 2 * 100 + x % 32)
    np.testing.assert_array_equal(found["group"], z * 100 + y // 2 * 10 + x // 32)
    np.testing.assert_array_equal(found["size"], high * 100 + wide)
    np.testing.assert_array_equal(found["index"], inside)
    np.testing.assert_array_equal(found["lane"], inside % 32)
    np.testing.assert_array_equal(found["simd"], inside // 32 * 100 + -(-wide * high // 32))
    np.testing.assert_array_equal(found["count"], np.full((2, 5, 70), 233))
