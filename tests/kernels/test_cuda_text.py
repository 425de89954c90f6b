"""Every kernel with a CUDA form, as MLX would compile it, through NVIDIA's compiler: no errors, no spilled registers."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitnet_mlx.backends.kernels import dp4a
from bitnet_mlx.backends.kernels.launch import Launch
from bitnet_mlx.backends.kernels.mma import MmaVariant
from tests.kernels import cuda_text
from tests.kernels.products import product
from tests.kernels.test_matmul_cuda import dp4a_launch, launch

pytestmark = pytest.mark.skipif(cuda_text.NVCC is None, reason="needs nvcc, NVIDIA's compiler")


def launches() -> dict[str, Launch]:
    """One launch or a few of each kernel."""
    case, grouped = product(8, 64, 256, dtype="bfloat16"), product(8, 64, 256, scale="group", dtype="bfloat16")
    return {
        "mma 128 x 128": launch(case, MmaVariant(2, 2, 1, 8, 4, 2, 4), "bfloat16"),
        "mma 128 x 160": launch(case, MmaVariant(2, 2, 1, 8, 5, 2, 4), "bfloat16"),
        "mma 16 x 16": launch(case, MmaVariant(1, 1, 8, 2, 1, 8, 4), "bfloat16"),
        "mma, groups": launch(grouped, MmaVariant(2, 2, 1, 8, 4, 2, 4), "bfloat16"),
        "dp4a": dp4a_launch(case, dp4a.Dp4aVariant(), "bfloat16"),
        "dp4a, groups": dp4a_launch(grouped, dp4a.Dp4aVariant(), "bfloat16"),
    }


@pytest.mark.parametrize("kernel", sorted(launches()))
def test_compiles_without_spills(kernel: str, tmp_path: Path) -> None:
    report = cuda_text.compile_cuda(launches()[kernel], tmp_path)
    assert report.spills == 0, report
