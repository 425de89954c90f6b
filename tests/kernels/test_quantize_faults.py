"""Faults planted in the quantise kernel are seen: by the emulator, or by the comparison that its exact tests make."""

from __future__ import annotations

import re

import pytest

from bitnet_mlx.backends.kernels.layout import Layout
from tests.emulator import Edit, FaultError
from tests.kernels.quantize_cases import Case
from tests.kernels.test_quantize import check, check_bits

_BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);\n"
_PLAIN = Case("bfloat16", Layout("halves"))
_NORM = Case("float32", Layout("halves", 2), norm=True)
_SILU = Case("float32", Layout("bytes"), act="silu")


@pytest.mark.parametrize(
    ("k", "edit"),
    [
        (2560, (_BARRIER + "if (!owner)", "if (!owner)")),
        (2560, (_BARRIER + "if (!NORM", "if (!NORM")),
        (20000, ("if (NORM && start > 0) " + _BARRIER, "")),
    ],
    ids=["squares", "divisor", "turns"],
)
def test_a_lost_barrier(k: int, edit: tuple[str, str]) -> None:
    with pytest.raises(AssertionError):
        for seed in range(4):
            check(_NORM, k, seed=seed, edit=edit)


def test_padding_that_is_not_written() -> None:
    with pytest.raises(FaultError, match="xq"):
        check(_NORM, 10, edit=("if (word < words)", "if (word * V < k)"))


@pytest.mark.parametrize(
    ("case", "edit"),
    [
        (_PLAIN, ("add_rn(mul_rn(p[i], factor), ROUNDING)", "metal::round(mul_rn(p[i], factor)) + ROUNDING")),
        (_NORM, ("turn < 2", "turn < 1")),  # rows below the floor keep their first codes
        (_NORM, ("g += W", "g += 1")),
        (_NORM, ("lane ^ (line % 4 * 4)", "lane")),
        (_NORM, ("sum = add_rn(sum, simd_shuffle_xor(sum, half_of))", "if (half_of == 16) sum = simd_sum(sum)")),
        (_NORM, ("div_rn(127.0f, mul_rn(chosen, r))", "div_rn(div_rn(127.0f, chosen), r)")),
        (_SILU, ("i < 4; i++) {\nbits[i] = (shifted[i]", "i < 4; i++) {\nbits[i] = (shifted[i + 1]")),
    ],
    ids=["half away from zero", "floor", "another lane's bias", "banks", "sum order", "scale order", "byte order"],
)
def test_wrong_arithmetic(case: Case, edit: tuple[str, str]) -> None:
    with pytest.raises(AssertionError):
        check(case, 100, edit=edit)
        check(case, 2560, edit=edit)
        check_bits(case, k=1000, rows=200, edit=edit)


def _squares_in_the_sum(text: str) -> str:
    """The lane multiplies and adds by bare operators what others left it as values."""
    text = re.sub(r"four\.(\w) = mul_rn\((p\[[^]]*\]), \2\);", r"four.\1 = \2;", text)
    return text.replace("sum = add_rn(sum, now[i]);", "sum = sum + now[i] * now[i];")


@pytest.mark.parametrize(
    ("case", "edit"),
    [
        (_NORM, _squares_in_the_sum),
        (_SILU, ("add_rn(mul_rn(p, mul_rn(r, r)), r)", "p * mul_rn(r, r) + r")),
    ],
    ids=["sum of squares", "exponential"],
)
def test_a_contraction_let_in(case: Case, edit: Edit) -> None:
    check_bits(case, edit=edit)  # the same bits where the compiler does not contract
    with pytest.raises(AssertionError, match="differ"):
        check_bits(case, edit=edit, flags=("contract",))
