"""The mat-vecs' text as CUDA reads it: run on the CPU with CUDA's names, and compiled by NVIDIA's compiler."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.backend import shapes
from tests.kernels import cuda_host, cuda_text, test_matvec, test_matvec_float
from tests.kernels.products import Product, product

# The words a load, the rows of the weight and M of each, the kind of scale, the dtype.
FORMS = [(1, 4, 1, "row", "bfloat16"), (2, 8, 2, "tensor", "float32"), (4, 2, 8, "row", "float16")]
FORMS += [(1, 4, 1, "group", "float32"), (4, 8, 3, "group", "bfloat16")]


def case_of(m: int, scale: str, dtype: str) -> Product:
    return product(m, 33, 640, scale=scale, bias=True, residual=m > 1, dtype=dtype)


@pytest.mark.skipif(cuda_host.CLANG is None, reason="needs clang++ on Linux")
@pytest.mark.parametrize(("words", "rows", "m", "scale", "dtype"), FORMS)
def test_exact(words: int, rows: int, m: int, scale: str, dtype: str) -> None:
    case = case_of(m, scale, dtype)
    shapes.same(cuda_host.run_on_host(test_matvec.launch_of(case, words, rows, dtype))[0], case.y, dtype)


@pytest.mark.skipif(cuda_host.CLANG is None, reason="needs clang++ on Linux")
@pytest.mark.parametrize("k", [600, 640])
def test_floating_point_is_exact_on_whole_numbers(k: int) -> None:
    case = product(2, 33, k, scale="group", plain=True)
    launch = test_matvec_float.launch_of(case, case.q.astype(np.float32), 4, "float32")
    shapes.same(cuda_host.run_on_host(launch)[0], case.y, f"K {k}")


@pytest.mark.skipif(cuda_text.NVCC is None, reason="needs nvcc, NVIDIA's compiler")
@pytest.mark.parametrize(("words", "rows", "m", "scale", "dtype"), FORMS)
def test_compiles_without_spills(words: int, rows: int, m: int, scale: str, dtype: str, tmp_path: Path) -> None:
    case = case_of(m, scale, dtype)
    x = case.q[:, :600].astype(case.y.dtype)
    for launch in (
        test_matvec.launch_of(case, words, rows, dtype),
        test_matvec_float.launch_of(case, x, rows, dtype),
    ):
        report = cuda_text.compile_cuda(launch, tmp_path)
        assert report.spills == 0, f"{launch.source.name}: {report}"
