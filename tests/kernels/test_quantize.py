"""The quantise kernel on the emulated grid: codes, biases and scales equal correctly rounded arithmetic to the last bit."""

from __future__ import annotations

import numpy as np
import pytest

from bitnet_mlx.backends import numpy_ref
from bitnet_mlx.backends.kernels.layout import Layout, halves, prepare
from bitnet_mlx.backends.kernels.quantize import ACTS, quantize
from bitnet_mlx.errors import BackendError
from bitnet_mlx.ternary import quantize_activations
from tests.backend.shapes import same
from tests.emulator import emulate
from tests.kernels.quantize_cases import DTYPES, K_NARROW, K_WIDE, LAYOUTS, Case, codes, reference

# Every dtype with every activation function, with a norm and without; every layout both ways and for two dtypes.
_KINDS = [(dtype, norm, act) for dtype in DTYPES for norm in (False, True) for act in ACTS]
CASES = [
    Case(dtype, LAYOUTS[(i + 2 * (i // 6)) % 6], norm, act, 1e-6 if i % 4 == 1 else 1e-5)
    for i, (dtype, norm, act) in enumerate(_KINDS)
]


def check(case: Case, k: int, rows: int = 17, **options: object) -> None:
    """The kernel's outputs for a case equal the expected ones."""
    found = emulate(case.launch(k, rows), **options)  # type: ignore[arg-type]
    for name, output, expected in zip(("codes", "biases", "scales"), found, case.expected(k, rows), strict=True):
        assert output.dtype == expected.dtype
        same(output, expected, f"{name} of {case}, K {k}, M {rows}")


def check_bits(case: Case, k: int = 40, rows: int = 1500, **options: object) -> None:
    """Many rows, whose scales show every bit of the largest value, or of the sum of squares."""
    rng = np.random.default_rng(k)
    x = rng.uniform(-4, 0 if case.act == "silu" else 4, (rows, k)).astype(DTYPES[case.dtype])
    v = x.astype(np.float32)
    if case.act is not None:
        up = rng.uniform(-4, 4, (rows, k)).astype(DTYPES[case.dtype])
        v = numpy_ref.gated(v, up.astype(np.float32), case.act)
        x = np.concatenate([x, up], axis=1)
    weight = rng.uniform(-2, 2, k).astype(np.float32)
    q, s = numpy_ref.norm_quantize(v, weight, case.eps) if case.norm else quantize_activations(v)
    norm = weight if case.norm else None
    launch = quantize(x, layout=case.layout, dtype=case.dtype, norm=norm, eps=case.eps, act=case.act)
    found = emulate(launch, **options)  # type: ignore[arg-type]
    for name, output, expected in zip(("codes", "biases", "scales"), found, (*prepare(q, case.layout), s), strict=True):
        same(output, expected, f"{name} of {rows} rows of {k}, {case}")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_codes_biases_and_scales(case: Case) -> None:
    # The wider form of the kernel differs by the room for squares and biases alone.
    for k in (*K_NARROW, *K_WIDE) if case.norm or case.act is None else K_NARROW:
        check(case, k)
        check(case, k, rows=1)


@pytest.mark.parametrize("k", [2560, 6912, 3200, 8640])
def test_the_layout_that_a_model_takes(k: int) -> None:
    check(Case("bfloat16", halves(k), norm=True), k, rows=3)


@pytest.mark.parametrize("case", [CASES[4], CASES[11]], ids=str)
@pytest.mark.parametrize("flags", [("contract",), ("split_fma",)], ids=str)
def test_no_contraction_changes_a_bit(case: Case, flags: tuple[str, ...]) -> None:
    check_bits(case, flags=flags)
    for k in (100, 2560):
        check(case, k, flags=flags)


@pytest.mark.parametrize("case", [CASES[4], CASES[11], CASES[15]], ids=str)
def test_no_order_changes_a_bit(case: Case) -> None:
    for seed in (1, 2, 3):
        for k in (100, 2560, 20000):
            check(case, k, rows=2, seed=seed)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("norm", [False, True])
def test_every_bit_of_a_value_shows_in_a_scale(norm: bool, act: str | None) -> None:
    case = Case("float32", Layout("bytes"), norm, act)
    check_bits(case)
    check_bits(case, k=1000, rows=200)


def test_halves_are_no_denormals() -> None:
    check(Case("float32", Layout("halves", 2), norm=True), 2560, flags=("flush_half",))


@pytest.mark.parametrize("act", ACTS)
def test_the_reference_gives_these_codes(act: str | None) -> None:
    """What is expected here is what numpy_ref defines."""
    for k in (*K_NARROW, *K_WIDE):
        for dtype in DTYPES:
            q, s = reference(dtype, act, 1e-5, k)
            expected_q, expected_s = codes(dtype, act, True, 1e-5, k)
            same(q, expected_q, f"{dtype}, K {k}, {act}")
            same(s, expected_s, f"scales, {dtype}, K {k}, {act}")


def test_threadgroups_stay_within_metals_limits() -> None:
    for case in CASES:
        for k in (*K_NARROW, *K_WIDE, 4096, 7168, 7169, 7680, 7681, 48_640):
            launch = quantize(
                np.zeros((2, k if case.act is None else 2 * k), np.float32),
                layout=case.layout,
                dtype="float32",
                norm=np.ones(k, np.float32) if case.norm else None,
                act=case.act,
            )
            most = dict(launch.template)["S"]
            values = 20 if case.layout.kind == "trits" else 16
            owners = launch.threadgroup[1] - case.norm
            assert 1 <= owners <= most <= 14
            assert launch.grid == (64, launch.threadgroup[1], 1)
            floats = most * 32 * values * case.norm + 33 + most * (64 if case.layout.kind == "halves" else 1)
            assert 4 * floats <= 32 * 1024
            if owners * 32 * values < k:  # in turns: a lane's words stay one lane's
                assert owners % case.layout.words == 0


@pytest.mark.parametrize(
    ("x", "options"),
    [
        (np.zeros((1, 4), np.float32), {}),
        (np.zeros((0, 64), np.float32), {}),
        (np.zeros((1, 33), np.float32), {"act": "silu"}),
        (np.zeros((1, 64), np.float32), {"act": "gelu"}),
        (np.zeros((1, 64), np.float32), {"norm": np.ones(32, np.float32)}),
    ],
)
def test_what_it_does_not_take(x: np.ndarray, options: dict[str, object]) -> None:
    with pytest.raises(BackendError, match=r"\[quantize\]"):
        quantize(x, layout=Layout("plain"), dtype="float32", **options)  # type: ignore[arg-type]
