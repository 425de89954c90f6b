"""The tensor cores' product and the dp4a mat-vec, their CUDA texts run on the CPU: equal to the integers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bitnet_mlx.backends.kernels import dp4a, matmul
from bitnet_mlx.backends.kernels.launch import Launch
from bitnet_mlx.backends.kernels.layout import Layout
from bitnet_mlx.backends.kernels.mma import MmaVariant
from bitnet_mlx.backends.kernels.source import read
from tests.backend.shapes import same
from tests.kernels import cuda_host
from tests.kernels.products import Product, product

pytestmark = pytest.mark.skipif(cuda_host.CLANG is None, reason="needs clang++ on Linux to run CUDA texts on the CPU")
BYTES = Layout("bytes")
SMALL = MmaVariant(1, 1, 4, 2, 2, 4, 3)  # 16 x 32 outputs a block
WIDE = MmaVariant(2, 2, 1, 8, 4, 2, 4)  # 128 x 128, the first choice for prefill
FORMS = [SMALL, WIDE, MmaVariant(1, 2, 2, 8, 5, 4, 3), MmaVariant(1, 1, 8, 2, 1, 8, 4)]
SHAPES = [(9, 1, 8), (17, 3, 100), (33, 129, 2560), (100, 33, 128), (17, 64, 6912), (1, 5, 10), (130, 200, 384)]


def launch(case: Product, variant: MmaVariant, dtype: str = "float32") -> Launch:
    arrays = case.rows(BYTES), case.words, case.scale, case.bias, case.residual
    return matmul.matmul(*arrays, layout=BYTES, variant=variant, dtype=dtype)


def dp4a_launch(case: Product, variant: dp4a.Dp4aVariant, dtype: str = "float32") -> Launch:
    arrays = case.rows(BYTES), case.words, case.scale, case.bias, case.residual
    return dp4a.dp4a_matvec(*arrays, variant=variant, dtype=dtype)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_accumulators(form: MmaVariant) -> None:
    for m, n, k in SHAPES:
        case = product(m, n, k, plain=True)
        exact = (case.q.astype(np.int64) @ case.t.T.astype(np.int64)).astype(np.float32)
        same(cuda_host.run_on_host(launch(case, form))[0], exact, f"M {m}, N {n}, K {k}")


@pytest.mark.parametrize(
    ("scale", "bias", "residual", "dtype"),
    [
        ("tensor", True, False, "bfloat16"),
        ("row", True, True, "bfloat16"),
        ("group", False, False, "float32"),
        ("group", True, True, "float16"),
        ("row", False, True, "float32"),
    ],
)
def test_outputs(scale: str, bias: bool, residual: bool, dtype: str) -> None:
    for form in (SMALL, WIDE):
        for m, n, k in ((17, 33, 100), (33, 70, 640)):
            case = product(m, n, k, scale=scale, bias=bias, residual=residual, dtype=dtype)
            same(cuda_host.run_on_host(launch(case, form, dtype))[0], case.y, f"M {m}, N {n}, K {k}, {form}")


def test_forms_fit_and_are_distinct() -> None:
    for n, k, m in ((2560, 6912, 512), (13824, 2560, 2048), (2560, 2560, 16), (1, 8, 1)):
        forms = matmul.variants(n, k, m, "cuda")
        assert forms and len(set(forms)) == len(forms)
        for form in forms:
            assert form.chunks % form.along == 0 and form.warps <= 32 and form.blocks_at_once > 0
            assert form.grouped().shared_memory <= 227 * 1024 and form.shared_memory <= 227 * 1024


@pytest.mark.parametrize(
    ("scale", "form", "m", "n", "k"),
    [
        ("group", dp4a.Dp4aVariant(2, 1, 2, 1, 4), 1, 33, 2560),
        ("row", dp4a.Dp4aVariant(4, 4, 1, 2, 4), 3, 5, 100),
        ("tensor", dp4a.Dp4aVariant(1, 2, 3, 4, 8), 2, 129, 6912),
    ],
)
def test_dp4a_outputs(scale: str, form: dp4a.Dp4aVariant, m: int, n: int, k: int) -> None:
    case = product(m, n, k, scale=scale, bias=m == 3, residual=m < 3, dtype="bfloat16")
    same(cuda_host.run_on_host(dp4a_launch(case, form, "bfloat16"))[0], case.y, f"M {m}, N {n}, K {k}")


FAULTS = {  # what a line of the body becomes, and what the run must say or get wrong
    "lost barrier": ("wait_batches<STAGES - 2>();\n__syncthreads();", "wait_batches<STAGES - 2>();"),
    "lost wait": ("wait_batches<STAGES - 2>();", ""),
    "lost bias": ("const int sum = SCALES == 2 ? 0 : int(as_type<float>(tail[0]));", "const int sum = 0;"),
    "wrong mask": ("word >> 2 * j & 0x03030303u", "word >> 2 * j & 0x03030301u"),
    "wrong slot": ("w_row % 2 * 8 + w_row % 16 / 2", "w_row % 16"),
    "lost guard of the store": ("if (n < columns) {", "{"),
    "lost guard of the load": ("i < w_left && w_along", "true"),
    "lost output": ("if (m < rows) {", "if (m < rows - 1) {"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = FAULTS[fault]
    body = read("matmul_mma.cu")
    assert body.count(before) == 1
    case = product(17, 71, 1100, plain=True)
    whole = launch(case, replace(SMALL, along=1, across=4, chunks=2))
    monkeypatch.setattr(type(whole.source), "body_text", lambda self: body.replace(before, after))
    with pytest.raises(AssertionError):
        same(cuda_host.run_on_host(whole)[0], case.y, fault)
