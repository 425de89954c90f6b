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


def check(
    case: Case, cut: Plan | None = None, edit: Edit | None = None, second: Edit | None = None, seed: int = 0
) -> None:
    out, recent = emulate(of(case, cut), seed=seed, edit=edit)
    if out.dtype != recent.dtype or out.ndim == 4:
        out = emulate(merge(out, case.dtype), seed=seed, edit=second)[0]
    attention_cases.check(case, out, recent)


def allowed(case: Case, cut: Plan) -> Plan:
    return replace(cut, queries=min(cut.queries, case.heads // case.kv_heads, 512 // case.dim))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode_attention(case: Case, dtype: str) -> None:
    number = CASES.index(case) + 3 * list(DTYPES).index(dtype)
    check(replace(case, dtype=dtype))
    check(replace(case, dtype=dtype), allowed(case, CUTS[number % len(CUTS)]), seed=number)


def test_every_order_of_threads() -> None:
    for seed in range(4):
        check(_FULL, Plan(2, 8, 3), seed=seed)


_BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);\n"
_FULL = Case(4, 2, 32, 30, 17, 21)


@pytest.mark.parametrize("cut", [Plan(2, 8, 1), Plan(2, 8, 3)], ids=str)
@pytest.mark.parametrize(
    "edit",
    [
        (_BARRIER + "const uint part", "const uint part"),
        (_BARRIER + "for (uint i = id; i < QUERIES", "for (uint i = id; i < QUERIES"),
        ("old = lengths[0]", "old = lengths[0] + 1"),
        ("count = old + held", "count = old + held - 1"),
        ("share == 0 && simd == 0", "false"),
        ("share == 0 && simd == 0", "share == 0"),
        ("if (slot < held)", "if (true)"),
        ("position < old ? old_plane", "position <= old ? old_plane"),
        ("if (position < end && piece < ROW)", "if (piece < ROW)"),
        (" < end ? dot : NO_SCORE", " < end ? dot : dot"),
        ("sum[q][e] *= shrink", "sum[q][e] *= 1.0f"),
        ("min(group * QUERIES + row, sharing - 1)", "0"),
        ("if (slot != held)", "if (slot < held)"),
        ("float(T(add_rn(mul_rn(x, c), -mul_rn(y, s))));\nturned", "float(T(add_rn(mul_rn(x, c), mul_rn(y, s))));\nturned"),
    ],
    ids=[
        "queries are there", "sums are there", "one too many", "one too few", "no new token", "many new tokens",
        "garbage kept", "another's values", "past the end", "weights of nothing", "no correction", "one head for all",
        "slots not written", "rotated the other way",
    ],
)  # fmt: skip
def test_planted_faults(edit: Edit, cut: Plan) -> None:
    with pytest.raises(AssertionError):
        for seed in range(3):
            check(_FULL, cut, edit=edit, seed=seed)


@pytest.mark.parametrize(
    "edit",
    [
        (_BARRIER + "if (id", "if (id"),
        ("share < count ? from[share * (DIM + 2) + DIM]", "true ? from[share * (DIM + 2) + DIM]"),
    ],
    ids=["sums are there", "past the end"],
)
def test_planted_faults_of_the_merger(edit: Edit) -> None:
    with pytest.raises(AssertionError):
        for seed in range(3):
            check(_FULL, Plan(2, 8, 3), second=edit, seed=seed)


def test_plans() -> None:
    def planned(batch: int, room: int, dim: int = 128, dtype: str = "bfloat16") -> tuple[int, int]:
        cut = plan(batch, 20, 5, dim, room, 64, dtype)
        return cut.queries, cut.shares

    assert [planned(1, room) for room in (1, 512, 513, 1024, 1536, 4096)] == [
        (1, 1),
        (1, 1),
        (4, 19),
        (4, 34),
        (4, 50),
        (4, 51),
    ]
    assert [planned(batch, 2048) for batch in (2, 8, 100)] == [(4, 25), (4, 6), (4, 1)]
    assert planned(100, 256) == planned(100, 1024) == (4, 1) and planned(10, 512) == (4, 5)
    assert planned(1, 2048, 256) == (2, 25) and planned(1, 2048, 128, "float32") == (4, 51)


def test_shapes_that_do_not_fit() -> None:
    case = Case(4, 2, 8)
    good = case.inputs()
    cut = Plan(2, 8, 1)
    for i, shape in (
        (0, (1, 1, 65)),
        (0, (1, 2, 64)),
        (1, (1, 1, 3)),
        (3, (2, 2, 2, 5, 8)),
        (4, (2, 1, 1, 64, 8)),
        (5, (3,)),
    ):
        bad = [np.zeros(shape, a.dtype) if j == i else a for j, a in enumerate(good)]
        with pytest.raises(BackendError, match=r"\[decode_attention\]"):
            decode_attention(*bad, heads=4, dtype="float32", cut=cut)  # type: ignore[call-arg]
