"""The simdgroup matrices' product on the emulated grid: equal to the integers, outputs equal to the last bit."""

from __future__ import annotations

import numpy as np
import pytest

from bitnet_mlx.backends.kernels import matmul
from bitnet_mlx.backends.kernels.launch import Launch
from bitnet_mlx.backends.kernels.layout import Layout, prepare
from bitnet_mlx.backends.kernels.mma import MmaVariant
from bitnet_mlx.backends.kernels.simd import SimdVariant
from bitnet_mlx.errors import ConfigError
from tests.backend import shapes
from tests.backend.shapes import same
from tests.emulator import FaultError, emulate
from tests.kernels.products import Product, product

PLAIN = matmul.LAYOUTS["metal"]
SMALL, WIDE = SimdVariant(2, 2, 4), SimdVariant(4, 4, 4)
FORMS = [SMALL, WIDE, SimdVariant(8, 2, 4), SimdVariant(4, 2, 8), SimdVariant(1, 3, 2)]


def launch(case: Product, variant: SimdVariant, dtype: str = "float32") -> Launch:
    x, b = prepare(case.q, PLAIN)
    return matmul.matmul(
        x, b, case.s, case.words, case.scale, case.bias, case.residual, layout=PLAIN, variant=variant, dtype=dtype
    )


@pytest.mark.parametrize(("n", "k"), [pair for pair in shapes.PAIRS if pair[0] < 2560 or pair[1] == 128])
def test_accumulators_on_every_boundary_shape(n: int, k: int) -> None:
    for i, m in enumerate((9, 17)):
        case = product(m, n, k, plain=True)
        exact = (case.q.astype(np.int64) @ case.t.T.astype(np.int64)).astype(np.float32)
        same(emulate(launch(case, (SMALL, WIDE)[i]), seed=n + k)[0], exact, f"M {m}, N {n}, K {k}")


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_forms(form: SimdVariant) -> None:
    for m, n, k in ((33, 129, 384), (100, 33, 100), (1, 7, 256), (65, 64, 128)):
        case = product(m, n, k, plain=True)
        same(emulate(launch(case, form), seed=1)[0], case.y, f"M {m}, N {n}, K {k}")


@pytest.mark.parametrize("scale", shapes.SCALES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_outputs(scale: str, dtype: str) -> None:
    for m, n, k, bias, residual in ((17, 33, 100, True, False), (9, 70, 640, False, True), (33, 5, 256, True, True)):
        case = product(m, n, k, scale=scale, bias=bias, residual=residual, dtype=dtype)
        same(emulate(launch(case, WIDE, dtype))[0], case.y, f"M {m}, N {n}, K {k}")


@pytest.mark.parametrize("flags", [("fast_math",), ("contract",), ("flush_half",)], ids=str)
def test_accumulators_under_other_compilers(flags: tuple[str, ...]) -> None:
    case = product(17, 33, 2560, plain=True)
    same(emulate(launch(case, WIDE), flags=flags)[0], case.y, str(flags))


FAULTS = {  # what a line of the text becomes
    "lost barrier": ("threadgroup_barrier(mem_flags::mem_threadgroup);", ""),
    "one tile instead of two": ("(chunk % 2) * (ROWS / 2) * PITCH", "0"),
    "wrong half": ("half2(-65.0h)", "half2(-64.0h)"),
    "wrong mask": ("m & 0x40C040C0u", "m & 0x40804080u"),
    "wrong place": ("item % 8;\nif", "(item ^ 1) % 8;\nif"),
    "lost guard of the store": ("if (column < columns) {", "{"),
    "lost guard of the load": ("min(column0 + n, columns - 1) * words + q", "(column0 + n) * words + q"),
    "lost guard of the rows": ("min(row0 + 2 * pair + 1, rows - 1)", "(row0 + 2 * pair + 1)"),
    "lost output": ("if (row < rows) {", "if (row < rows - 1) {"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault: str) -> None:
    case = product(17, 70, 1100, plain=True)
    with pytest.raises((AssertionError, FaultError)):
        for seed in range(3):
            same(emulate(launch(case, SMALL), edit=FAULTS[fault], seed=seed)[0], case.y, fault)


def test_variants_of_both_platforms_and_what_does_not_match() -> None:
    for m in (9, 64, 2048):
        forms = matmul.variants(2560, 6912, m, "metal")
        assert forms and len(set(forms)) == len(forms) and all(isinstance(form, SimdVariant) for form in forms)
        assert all(isinstance(form, MmaVariant) for form in matmul.variants(2560, 6912, m, "cuda"))
    case = product(9, 8, 128)
    with pytest.raises(ConfigError, match=r"\[matmul\] activations in layout 'bytes' and SimdVariant"):
        x, b = prepare(case.q, Layout("bytes"))
        matmul.matmul(x, b, case.s, case.words, case.scale, layout=Layout("bytes"), variant=SMALL, dtype="float32")
