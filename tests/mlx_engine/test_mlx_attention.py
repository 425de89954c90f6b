"""A decode step's attention by stock MLX: the bits of the cache, and the output within a rounding of float64's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from bitnet_mlx.backends.mlx_affine import StockOps
from bitnet_mlx.backends.mlx_import import mx
from tests.emulator import to_mlx, to_numpy
from tests.kernels.attention_cases import Case, check
from tests.kernels.quantize_cases import DTYPES

CASES = [
    Case(20, 5, 128, 300, 211, 37),
    Case(room=1, old=0, new=0),
    Case(room=1, old=1, new=63),
    Case(3, 1, 80, 7, 7, 0, batch=2),
    Case(2, 2, 6, 9, 4, 63, batch=3, angles=3, spread=8),
]


def ran(case: Case, call: Callable[..., tuple[mx.array, mx.array]]) -> tuple[np.ndarray, np.ndarray]:
    out, recent = call(*map(to_mlx, case.inputs()), case.heads, case.kv_heads)
    return to_numpy(out), to_numpy(recent)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode_attention(case: Case, dtype: str) -> None:
    case = Case(**{**case.__dict__, "dtype": dtype})
    check(case, *ran(case, StockOps().decode_attention))


def test_one_compilation_serves_all_lengths() -> None:
    traced = []

    def call(
        qkv: mx.array, cos: mx.array, sin: mx.array, past: mx.array, recent: mx.array, lengths: mx.array
    ) -> tuple[mx.array, mx.array]:
        traced.append(qkv)
        return StockOps().decode_attention(qkv, cos, sin, past, recent, lengths, 4, 1)

    compiled = mx.compile(call)
    for old, new in ((0, 0), (5, 1), (3, 63)):
        case = Case(dim=8, old=old, new=new)
        check(case, *ran(case, lambda *inputs: compiled(*inputs[:6])))
    assert len(traced) == 1
