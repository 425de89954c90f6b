"""Faults planted in the text of the mat-vecs are caught: by a wrong number, or by the emulated grid itself."""

from __future__ import annotations

import numpy as np
import pytest

from tests.backend import shapes
from tests.emulator import RefusedError, emulate
from tests.kernels import test_matvec, test_matvec_float
from tests.kernels.products import product

# (what is wrong, the kernel's kind of scale, the text, what stands there instead)
FAULTS = [
    ("a wrong mask", "row", "0x43004300u", "0x42004200u"),
    ("a wrong exponent", "row", "w | 0xC000C000u", "w | 0x80008000u"),
    ("the bias forgotten", "row", "(acc[m][r].x - added[m].x)", "(acc[m][r].x)"),
    ("one lane short", "row", "i += 32", "i += 31"),
    ("no guard of the store", "row", "if (m < M && row < rows)", "if (m < M)"),
    ("no guard of the load", "row", "min(r, rows - 1 - row0)", "r"),
    ("a lane's neighbour finishes", "row", "row0 + lane % R", "row0 + (lane + 1) % R"),
    ("descending groups", "group", "simd_shuffle(term, SHARE * j + member)", "simd_shuffle(term, 32 - SHARE * (j + 1) + member)"),
    ("half of a group", "group", "simd_shuffle_xor(upper ? low : high, o)", "0.0f"),
    ("groups past the end", "group", "g < groups ? scaled", "true ? scaled"),
    ("a contracted sum", "group", "add_rn(sum[m][i], simd", "fma(sum[m][i], 1.0000001f, simd"),
]  # fmt: skip
FLOAT_FAULTS = [
    ("a wrong place", "uint a = w << 12", "uint a = w << 10"),
    ("a tail that is not guarded", "left < 16", "left < 0"),
    ("the bias forgotten", "16384.0f * acc.five - bias", "16384.0f * acc.five"),
    ("a bias too many", "(x[2] + x[5])", "(x[2] + x[6])"),
]


def caught(case, launch, edit) -> bool:
    try:
        found = emulate(launch, edit=edit)[0]
    except RefusedError:
        raise  # a fault that does not compile proves nothing
    except AssertionError:  # what the grid sees: FaultError
        return True
    return not np.array_equal(found, case.y)


@pytest.mark.parametrize(("fault", "scale", "old", "new"), FAULTS, ids=[f[0] for f in FAULTS])
def test_caught(fault: str, scale: str, old: str, new: str) -> None:
    case = product(3, 33, 640, scale=scale)
    launch = test_matvec.launch_of(case, 1, 4)
    shapes.same(emulate(launch)[0], case.y, "before the fault")
    assert caught(case, launch, (old, new)), fault


@pytest.mark.parametrize(("fault", "old", "new"), FLOAT_FAULTS, ids=[f[0] for f in FLOAT_FAULTS])
def test_caught_in_floating_point(fault: str, old: str, new: str) -> None:
    case = product(3, 33, 600, scale="row", plain=True)
    launch = test_matvec_float.launch_of(case, case.q.astype(np.float32), 4, "float32")
    shapes.same(emulate(launch)[0], case.y, "before the fault")
    assert caught(case, launch, (old, new)), fault
