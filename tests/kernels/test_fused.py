"""The mat-vec that quantises its own row, its CUDA text run on the CPU: the reference's bits, and planted faults caught."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bitnet_mlx.backends.kernels.fused import FusedVariant, fused_matvec, possible, variants
from bitnet_mlx.backends.kernels.source import read
from bitnet_mlx.errors import BackendError
from tests.backend.shapes import same
from tests.kernels import cuda_host, cuda_text
from tests.kernels.fused_cases import CASES, FusedCase

needs_clang = pytest.mark.skipif(cuda_host.CLANG is None, reason="needs clang++ on Linux to run CUDA texts on the CPU")
needs_nvcc = pytest.mark.skipif(cuda_text.NVCC is None, reason="needs nvcc, NVIDIA's compiler")
REAL = [(2560, 2560, None, 2), (13824, 2560, None, 0), (2560, 6912, "relu2", 2)]


ROWS = (
    0,
    1,
    4,
    6,
    7,
    8,
    9,
    12,
    15,
)  # of quantize_cases: ties, zeros, an outlier, below the floor and at it, the largest


def check(case: FusedCase) -> None:
    for row in ROWS:
        found = cuda_host.run_on_host(case.launch(row))[0]
        same(found, case.expected(row), f"row {row} of {case}")


@needs_clang
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_bits(case: FusedCase) -> None:
    check(case)


@needs_nvcc
@pytest.mark.parametrize(("n", "k", "act", "extras"), REAL)
def test_compiles_without_spills(n: int, k: int, act: str | None, extras: int, tmp_path: Path) -> None:
    for form in variants(n, k, True)[:1]:
        launch = FusedCase(n, k, form, act=act, extras=extras).launch(0)
        report = cuda_text.compile_cuda(launch, tmp_path)
        assert report.spills == 0 and report.stack == 0, f"{form}: {report}"
        assert report.registers * launch.threadgroup[0] <= 65536, f"{form}: {report}"


BARRIER = "__syncthreads();\n"
FAULTS = {  # what a line of the body becomes
    "lost barrier of the squares": ("tops[warp] = top;\n" + BARRIER, "tops[warp] = top;\n"),
    "lost barrier of the codes": (BARRIER + "if (!NORM", "if (!NORM"),
    "floor": ("turn < 2", "turn < 1"),
    "lane order": ("(const float*)squares + lane", "(const float*)squares + (lane / 4 + lane % 4 * 8)"),
    "line order": ("sum = add_rn(sum, now[i]);", "sum = add_rn(sum, now[7 - i]);"),
    "lanes halved otherwise": ("half_of = 16; half_of > 0; half_of /= 2", "half_of = 1; half_of < 32; half_of *= 2"),
    "scale order": ("div_rn(127.0f, mul_rn(chosen, r))", "div_rn(div_rn(127.0f, chosen), r)"),
    "exchange of bytes": ("0x3715", "0x3751"),
    "wrong mask": ("word >> 4 & 0x03030303u", "word >> 4 & 0x03030301u"),
    "lost guard of the codes": ("if (word < words) ", ""),
    "lost sum": ("mine -= sums[i];", "mine -= i ? sums[i] : 1;"),
    "lost batch": ("if (start >= end) break;", "if (start < end + 99999) break;"),
}


@needs_clang
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = FAULTS[fault]
    body = read("matvec_row.cu")
    assert body.count(before) == 1
    source = type(FusedCase(1, 8).launch(0).source)
    nothing = source._nothing
    monkeypatch.setattr(source, "body_text", lambda self: nothing(self) + body.replace(before, after))
    with pytest.raises(AssertionError):
        check(FusedCase(33, 1036, FusedVariant(8, 1, 2, 2, 3), "float32"))


def test_what_is_not_possible() -> None:
    assert not variants(5, 60000, True) and not variants(5, 7, True)
    assert not possible(FusedVariant(warps=1), 8, True) and possible(FusedVariant(warps=4), 2560, True)
    x, words = np.zeros((2, 128), np.float32), np.zeros((3, 8), np.uint32)
    one, groups = np.ones(1, np.float32), np.ones((3, 1), np.float32)
    for arrays, act in (
        ((x, None, words, one), None),
        ((x[:1], None, words, groups), None),
        ((x[:1], None, words, one), "gelu"),
    ):
        with pytest.raises(BackendError, match="fused"):
            fused_matvec(*arrays, variant=FusedVariant(), dtype="float32", act=act)
