"""The half-mantissa mat-vec on the emulated grid: whole numbers equal to integer arithmetic, outputs equal to the last bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from bitnet_mlx.backends.kernels.launch import Launch
from bitnet_mlx.backends.kernels.layout import HALF_BIAS, HALF_LIMIT, HALF_SCALE, HALF_UNIT, Layout, halves, prepare
from bitnet_mlx.backends.kernels.matvec import LANE_WORDS, MatvecVariant, halves_of, matvec, variants
from bitnet_mlx.errors import ConfigError
from bitnet_mlx.formats import words2
from bitnet_mlx.ternary import TernaryTensor
from tests.backend import shapes
from tests.emulator import emulate
from tests.kernels.products import Product, product

# (words a load, rows of the weight, M): every pair of the first two, every M, each with one compiled kernel a body.
FORMS = [(1, 1, 8), (1, 2, 3), (1, 4, 1), (1, 8, 2), (2, 1, 5), (2, 2, 8), (2, 4, 4), (2, 8, 1)]
FORMS += [(4, 1, 7), (4, 2, 1), (4, 4, 6), (4, 8, 3)]
WIDEST = {1: HALF_LIMIT, 2: 94 * 512, 4: 92 * 512}  # 95, 94 and 92 words a lane


def launch_of(case: Product, words: int, rows: int, dtype: str = "float32") -> Launch:
    """A launch of a case of tests/kernels/products.py."""
    layout = Layout("halves", words)
    xq, xb = prepare(case.q, layout)
    variant = MatvecVariant(rows, 2)
    return matvec(
        xq, xb, case.s, case.words, case.scale, case.bias, case.residual, layout=layout, variant=variant, dtype=dtype
    )


@dataclass(frozen=True)
class Emulated:
    """A backend of tests/backend/shapes.py. There is always a bias, if only of zeros: one kernel then serves all."""

    layout: Layout
    variant: MatvecVariant
    options: tuple[tuple[str, Any], ...] = ()

    def accumulate(self, q: np.ndarray, weight: TernaryTensor) -> np.ndarray:
        ones = TernaryTensor(weight.words, np.ones_like(weight.scale), weight.shape)
        return self.linear(q, np.ones(len(q), np.float32), ones, None)

    def linear(self, q: np.ndarray, s: np.ndarray, weight: TernaryTensor, bias: np.ndarray | None) -> np.ndarray:
        xq, xb = prepare(q, self.layout)
        added = np.zeros(weight.shape[0], np.float32) if bias is None else bias
        options = {"layout": self.layout, "variant": self.variant, "dtype": "float32"}
        return emulate(matvec(xq, xb, s, weight.words, weight.scale, added, **options), **dict(self.options))[0]


@pytest.mark.parametrize(("n", "k"), shapes.PAIRS)
def test_boundary_shapes(n: int, k: int) -> None:
    at = shapes.PAIRS.index((n, k))
    for i, (words, rows, m) in enumerate(FORMS):
        if (n > 129 and i != at % len(FORMS)) or (n < 8 and i % 4 != at % 4):
            continue  # a large weight meets one form; a few rows, whose scales lie in the constant space, meet three
        backend = Emulated(Layout("halves", words), MatvecVariant(rows, (1, 2, 4, 8)[i % 4]), (("seed", i),))
        kind = ("row", "group")[(i + at) % 2]
        shapes.check_products(n, k, backend, ms=(m,), kinds=(kind,), added=True)


@pytest.mark.parametrize("k", [100, 2560])
def test_one_scale_for_the_tensor(k: int) -> None:
    backend = Emulated(halves(k), MatvecVariant())
    shapes.check_products(33, k, backend, ms=(1,), kinds=("tensor",))


def test_the_integer_of_each_group() -> None:
    n, k = 3, 2560
    case = product(1, n, k, scale="group", plain=True)
    groups = k // shapes.GROUP
    words = np.repeat(case.words, groups, axis=0)  # row n, g keeps group g alone
    one = TernaryTensor(words, np.tile(np.eye(groups, dtype=np.float32), (n, 1)), (n * groups, k))
    found = Emulated(Layout("halves", 1), MatvecVariant(4)).linear(case.q, case.s, one, None)
    by_group = case.t.reshape(n, groups, -1).astype(np.int64) * case.q.reshape(1, groups, -1)
    assert np.array_equal(found[0], by_group.sum(axis=2).reshape(-1))


@pytest.mark.parametrize("words", [1, 2, 4])
def test_extremes(words: int) -> None:
    for k in (256, 2560, 12288, WIDEST[words]):
        rng = np.random.default_rng(k)
        q = rng.integers(-128, 128, (8, k)).astype(np.int8)
        q[0], q[1], q[2], q[3] = 127, -128, np.where(rng.integers(0, 2, k) == 1, 127, -128), 0
        t = rng.integers(-1, 2, (11, k)).astype(np.int8)
        t[0], t[1] = 1, -1
        t[2:10] = np.sign(q)  # the largest sums
        layout = Layout("halves", words)
        xq, xb = prepare(q, layout)
        one = np.ones(8, np.float32)
        call = matvec(xq, xb, one, words2.pack(t), one[:1], layout=layout, variant=MatvecVariant(4), dtype="float32")
        shapes.same(emulate(call)[0], q.astype(np.int64) @ t.T.astype(np.int64), f"K {k}, {words} words a load")


FLOATS = [("float32", b, r) for b in (False, True) for r in (False, True)]
FLOATS += [("bfloat16", True, True), ("bfloat16", False, True), ("float16", True, True), ("float16", False, False)]


@pytest.mark.parametrize(("dtype", "bias", "residual"), FLOATS)
def test_outputs_are_the_float32_results_rounded(dtype: str, bias: bool, residual: bool) -> None:
    for m, n in ((3, 33), (3, 2)):  # the second: scale, bias and residual lie in the constant address space
        case = product(m, n, 100, scale="row", bias=bias, residual=residual, dtype=dtype)
        shapes.same(emulate(launch_of(case, 2, 4, dtype))[0], case.y, f"{dtype}, N {n}")


@pytest.mark.parametrize(("dtype", "more"), [("float32", False), ("bfloat16", True)])
def test_outputs_of_groups_are_rounded_once(dtype: str, more: bool) -> None:
    case = product(2, 33, 640, scale="group", bias=more, residual=more, dtype=dtype)
    shapes.same(emulate(launch_of(case, 2, 4, dtype))[0], case.y, dtype)


@pytest.mark.parametrize("flags", [("fast_math", "flush_half"), ("split_fma",), ("contract",)])
def test_exact_whatever_the_compiler_and_the_chip_do(flags: tuple[str, ...]) -> None:
    for scale, words in (("tensor", 1), ("group", 2)):
        case = product(3, 9, 2560, scale=scale, plain="fast_math" in flags)  # fast math may divide otherwise
        shapes.same(emulate(launch_of(case, words, 4), flags=flags)[0], case.y, f"{flags}, {scale}")


def test_masks_make_the_halves_that_the_layout_expects() -> None:
    t = np.random.default_rng(0).integers(-1, 2, (1, 128 * 16)).astype(np.int8)
    found = halves_of(words2.pack(t)).astype(np.float64) * np.reshape(HALF_SCALE, (8, 1))
    expected = (t.reshape(1, -1, 2, 8).swapaxes(2, 3) + np.reshape(HALF_BIAS, (8, 1))) * HALF_UNIT
    assert np.array_equal(found, expected)


def test_the_widest_lane_stays_whole() -> None:
    word = 128 * sum(b + 1 for b in HALF_BIAS)  # the largest that a word adds to one of a lane's sums
    assert LANE_WORDS * word < 2**24 < (LANE_WORDS + 1) * word
    assert LANE_WORDS * 32 * 16 == HALF_LIMIT


@pytest.mark.parametrize("words", [1, 2, 4])
def test_a_wider_weight_is_refused(words: int) -> None:
    def call(k: int) -> Launch:
        layout = Layout("halves", words)
        xq, xb = np.zeros((1, k), np.float16), np.zeros((1, 64), np.float32)
        w, one = np.zeros((4, k // 16), np.uint32), np.ones(1, np.float32)
        return matvec(xq, xb, one, w, one, layout=layout, variant=MatvecVariant(), dtype="float32")

    call(WIDEST[words])
    with pytest.raises(ConfigError, match="48640 with one word"):
        call(WIDEST[words] + 128)


def test_the_layout_chosen_for_a_width_is_never_refused_below_the_limit() -> None:
    for k in range(128, HALF_LIMIT + 1, 128):
        assert k <= WIDEST[halves(k).words], k


def test_bad_arguments_are_refused() -> None:
    one, w = np.ones(9, np.float32), np.zeros((4, 8), np.uint32)
    xq, xb = np.zeros((9, 128), np.float16), np.zeros((9, 64), np.float32)
    with pytest.raises(ConfigError, match="9 rows"):
        matvec(xq, xb, one, w, one[:1], layout=Layout("halves"), variant=MatvecVariant(), dtype="float32")
    with pytest.raises(ConfigError, match="'plain'"):
        matvec(xq[:1], xb[:1], one[:1], w, one[:1], layout=Layout("plain"), variant=MatvecVariant(), dtype="float32")


@pytest.mark.parametrize("m", range(1, 9))
def test_variants_fit(m: int) -> None:
    for n, k in ((33, 100), (2560, 2560), (20480, 3200)):
        found = variants(n, k, m)
        assert found and len(found) == len(set(found))
        assert all(v == v.fit(m) and v.rows in (1, 2, 4, 8) for v in found)
