"""The attention kernels on the emulated grid: within a rounding of float64's output, and the cache to the last bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bitnet_mlx.backends.kernels.attention import Plan, decode_attention, merge, plan
from bitnet_mlx.backends.kernels.launch import Launch
from bitnet_mlx.errors import BackendError
from tests.emulator import Edit, emulate
from tests.kernels import attention_cases
from tests.kernels.attention_cases import Case
from tests.kernels.quantize_cases import DTYPES

CASES = [
    Case(20, 5, 128, 40, 33, 37),
    Case(room=1, old=0, new=0),
    Case(room=1, old=1, new=63),
    Case(3, 1, 80, 7, 7, 0, batch=2),
    Case(2, 2, 6, 9, 4, 63, batch=3, angles=3, spread=8),
    Case(4, 2, 256, 5, 3, 5),
    Case(7, 1, 96, 11, 0, 9, spread=8),
    Case(1, 1, 4, 3, 2, 1),
]
CUTS = [Plan(1, 16, 1), Plan(4, 8, 1), Plan(3, 8, 5), Plan(1, 8, 64)]


def of(case: Case, cut: Plan | None = None) -> Launch:
    """The first launch of a case. cut: None, the usual one."""
    qkv, *others = case.inputs()
    usual = plan(case.batch, case.heads, case.kv_heads, case.dim, case.room, case.slots, case.dtype)
    return decode_attention(qkv, *others, heads=case.heads, dtype=case.dtype, cut=cut or usual)


def check(case: Case, cut: Plan | None = None, edit: Edit | None = None, second: Edit | None = None, seed: int = 0) -> None:
    out, recent = emulate(of(case, cut), seed=seed, edit=edit)
    if out.dtype != recent.dtype or out.ndim == 4:
        out = emulate(merge(out, case.dtype), seed=seed, edit=second)[0]
    attention_cases.check(case, out, recent)


def allowed(case: Case, cut: Plan) -> Plan:
    return replace(cut, queries=min(cut.queries, case.heads // case.kv_heads, 512 // case.dim))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode_attention(case: Case, dtype: str) -> None:
    case = replace(case, dtype=dtype)
    check(case)
    for seed, cut in enumerate(CUTS):
        check(case, allowed(case, cut), seed=seed)
