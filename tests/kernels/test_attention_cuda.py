"""The CUDA texts of the attention kernels: run on the CPU they give what Metal's do; nvcc keeps them in registers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bitnet_mlx.backends.kernels.attention import Plan, merge
from tests.kernels import cuda_host, cuda_text
from tests.kernels.attention_cases import Case, check
from tests.kernels.test_attention import of

CASES = [
    (Case(8, 2, 128, 60, 33, 37, dtype="bfloat16"), Plan(1, 16, 1)),
    (Case(8, 2, 128, 60, 33, 63, dtype="float16", batch=2), Plan(4, 8, 5)),
    (Case(3, 1, 80, 5, 0, 0, dtype="float32"), Plan(3, 8, 64)),
    (Case(5, 1, 6, 1, 1, 0, dtype="bfloat16"), Plan(3, 8, 2)),
]


@pytest.mark.skipif(cuda_host.CLANG is None, reason="needs clang++ on Linux")
@pytest.mark.parametrize(("case", "cut"), CASES, ids=str)
def test_on_the_cpu(case: Case, cut: Plan) -> None:
    out, recent = cuda_host.run_on_host(of(case, cut))
    if cut.shares > 1:
        out = cuda_host.run_on_host(merge(out, case.dtype))[0]
    check(case, out, recent)


@pytest.mark.skipif(cuda_text.NVCC is None, reason="needs nvcc, NVIDIA's compiler")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_compiles_without_spills(dtype: str, tmp_path: Path) -> None:
    for old in (100, 2000):
        case = Case(20, 5, 128, old, old, 37, dtype=dtype)
        launch = of(case)
        report = cuda_text.compile_cuda(launch, tmp_path)
        assert report.spills == 0 and report.stack == 0
        assert report.registers * 32 * launch.threadgroup[1] <= 65536  # else it cannot be launched


@pytest.mark.skipif(cuda_text.NVCC is None, reason="needs nvcc, NVIDIA's compiler")
def test_the_merger_compiles_without_spills(tmp_path: Path) -> None:
    for dim in (128, 256):
        report = cuda_text.compile_cuda(merge(np.zeros((1, 2, 5, dim + 2), np.float32), "bfloat16"), tmp_path)
        assert report.spills == 0 and report.stack == 0
