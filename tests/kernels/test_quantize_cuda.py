"""The CUDA texts of the quantise and RoPE kernels: run on the CPU they give the same bits; nvcc keeps them in registers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bitnet_mlx.backends.kernels.layout import Layout
from bitnet_mlx.backends.kernels.rope import rope_kv
from tests.kernels import cuda_host, cuda_text
from tests.kernels.quantize_cases import Case, same_rows

CASES = [
    Case("bfloat16", Layout("bytes"), norm=True),
    Case("float32", Layout("bytes"), act="relu2"),
    Case("bfloat16", Layout("halves", 2), norm=True, act="relu2"),
    Case("float16", Layout("trits"), norm=True, act="silu"),
    Case("float32", Layout("plain")),
]


@pytest.mark.skipif(cuda_host.CLANG is None, reason="needs clang++ on Linux")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bits_on_the_cpu(case: Case) -> None:
    for k in (128, 2560, 20000):
        found = cuda_host.run_on_host(case.launch(k, rows=13))[0]
        same_rows(found, case.expected(k, rows=13), case.layout, k, f"{case}, K {k}")


@pytest.mark.skipif(cuda_text.NVCC is None, reason="needs nvcc, NVIDIA's compiler")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiles_without_spills(case: Case, tmp_path: Path) -> None:
    report = cuda_text.compile_cuda(case.launch(6912, rows=1), tmp_path)
    assert report.spills == 0
    if case.layout.kind == "bytes":  # 15 warps twice on a multiprocessor
        assert report.registers <= 64


@pytest.mark.skipif(cuda_text.NVCC is None, reason="needs nvcc, NVIDIA's compiler")
def test_rope_compiles_without_spills(tmp_path: Path) -> None:
    angles = np.zeros((1, 2, 64), np.float32)
    launch = rope_kv(np.zeros((1, 2, 30 * 128), np.float32), angles, angles, heads=20, kv_heads=5, dtype="float32")
    assert cuda_text.compile_cuda(launch, tmp_path).spills == 0
