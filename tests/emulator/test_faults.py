"""The emulator runs a right kernel exactly, and tells every kind of wrong one: a fault is planted and must be reported."""

from __future__ import annotations

import numpy as np
import pytest

from tests.emulator import FaultError, RefusedError, emulate, grid
from tests.emulator.probe import launch, matvec


@pytest.mark.parametrize(("n", "k"), [(4, 128), (33, 256), (129, 2560)])
def test_a_right_kernel_gives_the_integers(n, k):
    made, expected = matvec(n, k)
    for seed in range(3):
        np.testing.assert_array_equal(emulate(made, seed=seed)[0], expected)


WRONG = {
    "a wrong mask": ("& 3u", "& 1u"),
    "a missing bias": (" + b[row]", ""),
    "a wrong shift": ("(2 * i)", "(2 * i + 1)"),
    "words left out": ("word += 32", "word += 33"),
    "a wrong lane": ("simd_sum(part[", "simd_max(part["),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_result_is_seen(fault):
    made, expected = matvec(33, 768)
    assert not np.array_equal(emulate(made, edit=WRONG[fault])[0], expected)


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
GUARD = "if (lane == 0 && row < uint(y_rows[0])) {"
FAULTS = {
    "a read past a buffer": ("word < K / 16", "word <= K / 16", "a read of .* past the end of"),
    "a read before one": ("x[16 * word + i]", "x[16 * word + i - 1]", "a read of .* before the start of x"),
    "a lost guard of a store": (GUARD, "if (lane == 0) {", "outside a buffer"),
    "a write past a buffer": ("y[row] =", "y[row + 1] =", "a write of .* past the end of y"),
    "a write into an input": (GUARD, GUARD + "const device float* at = b; *(device float*)at = 1.0f;", "is an input"),
    "an output never written": ("lane == 0 &&", "lane == 0 && row != 3 &&", "1 of 33 elements of the output y are never"),
    "a lost barrier": (BARRIER, "", "no barrier|no thread has written"),
    "a barrier of other memory": (BARRIER, BARRIER.replace("mem_threadgroup", "mem_device"), "no barrier|no thread has"),
    "a barrier of a simdgroup only": ("scales[0] = s[0]; }", "scales[0] = s[0]; } simdgroup_barrier(mem_flags::mem_threadgroup);"
                                      " float early = scales[0];", "no barrier|no thread has written"),
    "a barrier that some threads miss": (BARRIER, f"if (lane < 9) {BARRIER}", "no barrier|different operations|no thread has"),
    "a barrier that a simdgroup misses": (BARRIER, f"if (row == 2) return; {BARRIER}", "have ended while others wait"),
    "a thread that ends too early": ("sum = simd_sum(", "if (lane == 9) return; sum = simd_sum(", "have ended"),
    "different operations": ("sum = simd_sum(", "if (lane == 9) { sum = simd_max(sum); } sum = simd_sum(", "different operations"),
    "two values for one element": ("lane == 0 &&", "lane < 2 && (lane == 0 || (sum += 1.0) != 0) &&", "different values to y"),
    "threadgroup memory never written": ("scales[0] = s[0];", "", "no thread has written"),
    "an unaligned vector": ("uint codes = ", "uint codes = ((const device uint2*)(w + 1))->x; codes = ", "not aligned to 8"),
    "a table read outside": ("scales[0] = s[0]", "scales[0] = s[1]", "past the end of s"),
    "a threadgroup array's end by a pointer": ("float sum = 0;", "threadgroup float* p = &part[0][0]; float sum = p[128];",
                                               "past the end of part"),
    "an index outside": ("[lane]);", "[lane + 1]);", "an index outside an array"),
    "an array's end": ("float sum = 0;", "float own[4] = {}; own[lane] = 1; float sum = own[0];", "outside an array"),
    "a float that its integer cannot hold": ("y[row] = T(", "y[row] = T(int(char(sum * 1000.0f + 200.0f)) + ", "do not hold it"),
    "a division by zero": ("K / 16;", "K / (16 * int(row - row));", "divided by zero"),
    "a loop without an end": ("float sum = 0;", "float sum = 0; while (K) { sum += float(w[0]); }", "longer than"),
    "too much threadgroup memory": ("scales[1];", "scales[1], more[9000]; more[0] = 1;", "a threadgroup has 32768"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_a_run_is_reported(fault, monkeypatch):
    old, new, message = FAULTS[fault]
    monkeypatch.setattr(grid, "LIMIT_SECONDS", 1)
    made, _ = matvec(33, 256)
    with pytest.raises(FaultError, match=message):
        emulate(made, edit=(old, new))


REFUSED = {
    "a lost address space": ("uint row =", "const thread uint* lost = w; uint row =", "__private uint.*__global"),
    "a cast that drops one": (
        "uint row =",
        "const thread uint* lost = (const thread uint*)w; uint row =",
        "mismatching address",
    ),
    "a cast to none": ("uint row =", "uint lost = *(const uint*)w; uint row =", "loses its address space"),
    "a pointer without one": ("float sum = 0;", "float sum = 0; float* p = &sum;", "without an address space"),
    "a reference without one": ("float sum = 0;", "float sum = 0; float& r = sum;", "without an address space"),
    "double arithmetic": ("sum * 1.0", "double(sum)", "double"),
    "a bfloat from a float": ("float sum = 0;", "float sum = 0; bfloat narrow = sum;", "to bfloat"),
    "a device pointer to constant memory": ("uint row =", "const device float* p = s; uint row =", "__constant"),
    "no such name": ("simd_sum", "simd_total", "simd_total"),
    "an exception": ("float sum = 0;", "float sum = 0; if (K < 0) throw 1;", "no throw"),
    "the C library": ("float sum = 0;", "float sum = 0; printf(0);", "printf"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_metal_refuses_is_refused(fault):
    old, new, message = REFUSED[fault]
    made, _ = matvec(33, 256)
    with pytest.raises(RefusedError, match=message):
        emulate(made, edit=(old, new))


def test_threadgroups_may_not_meet():
    """What one threadgroup writes another may not read, whatever the order they happen to run in."""
    body = """
        uint i = thread_position_in_grid.x;
        y[i] = x[i];
        threadgroup_barrier(mem_flags::mem_device);
        if (i == 0) { y[0] = y[40]; }
    """
    made = launch(body, {"x": np.arange(64, dtype=np.float32)}, {"y": ((64,), "float32")}, grid=(64, 1, 1))
    for seed in range(4):
        with pytest.raises(FaultError, match="no barrier|no thread has written"):
            emulate(made, seed=seed)
    same = ("y[40]", "y[20]")
    np.testing.assert_array_equal(emulate(made, edit=same)[0], np.r_[20, np.arange(1, 64)])


def test_a_struct_copied_past_a_buffer():
    header = "struct Pair { float a, b; };\n"
    body = """
        Pair p = ((const device Pair*)x)[thread_position_in_grid.x + OFF];
        y[thread_position_in_grid.x] = p.a + p.b;
    """
    x = np.arange(64, dtype=np.float32)
    made = launch(body, {"x": x}, {"y": ((32,), "float32")}, header=header, OFF=0)
    np.testing.assert_array_equal(emulate(made)[0], x[::2] + x[1::2])
    made = launch(body, {"x": x}, {"y": ((32,), "float32")}, header=header, OFF=1)
    with pytest.raises(FaultError, match="a read of 8 bytes outside a buffer: 8 bytes past the end of x"):
        emulate(made)


def test_an_edit_that_changes_nothing_is_an_error():
    with pytest.raises(AssertionError, match="changes nothing"):
        emulate(matvec(4, 128)[0], edit=("no such text", ""))
