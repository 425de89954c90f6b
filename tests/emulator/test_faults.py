"""The emulator runs a right kernel exactly, and tells every kind of wrong one."""

from __future__ import annotations

import numpy as np
import pytest

from tests.emulator import FaultError, RefusedError, emulate
from tests.emulator.probe import matvec


@pytest.mark.parametrize(("n", "k"), [(4, 128), (33, 256), (129, 2560)])
def test_a_right_kernel_gives_the_integers(n, k):
    made, expected = matvec(n, k)
    for seed in range(3):
        np.testing.assert_array_equal(emulate(made, seed=seed)[0], expected)


FAULTS = {
    "a read past a buffer": ("word < K / 16", "word <= K / 16", "outside a buffer"),
    "a lost store guard": ("if (lane == 0 && row < uint(y_rows[0]))", "if (lane == 0)", "outside a buffer"),
    "an output never written": ("lane == 0 &&", "lane == 0 && row != 3 &&", "never written"),
    "a lost barrier": ("threadgroup_barrier(mem_flags::mem_threadgroup);", "", "no barrier|no thread has written"),
    "a barrier that some threads miss": (
        "threadgroup_barrier",
        "if (lane < 9) threadgroup_barrier",
        "no barrier|different operations|no thread has written",
    ),
    "a thread that ends too early": ("sum = simd_sum(", "if (lane == 9) return; sum = simd_sum(", "have ended"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_a_run_is_reported(fault):
    old, new, message = FAULTS[fault]
    made, _ = matvec(33, 256)
    with pytest.raises(FaultError, match=message):
        emulate(made, edit=(old, new))


REFUSED = {
    "a lost address space": ("uint row =", "const thread uint* lost = w; uint row =", "__private uint.*__global"),
    "a cast that drops one": (
        "uint row =",
        "const thread uint* lost = (const thread uint*)w; uint row =",
        "address space",
    ),
    "a pointer without one": ("float sum = 0;", "float sum = 0; float* p = &sum;", "without an address space"),
    "double arithmetic": ("sum * 1.0", "double(sum)", "double"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_metal_refuses_is_refused(fault):
    old, new, message = REFUSED[fault]
    made, _ = matvec(33, 256)
    with pytest.raises(RefusedError, match=message):
        emulate(made, edit=(old, new))
