"""KernelOps gives StockOps' outputs, bit for bit, by whatever kernel, layout and shape; stock MLX is behind all of it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from bitnet_mlx.backends.kernels.chooser import BestGuess
from bitnet_mlx.backends.kernels.launch import Launch
from bitnet_mlx.backends.kernels.layout import HALF_LIMIT, Layout, halves
from bitnet_mlx.backends.kernels.ops import KernelOps, plain
from bitnet_mlx.backends.kernels.row_kernels import RowKernel
from bitnet_mlx.backends.kernels.source import Platform
from bitnet_mlx.backends.mlx_affine import StockOps
from bitnet_mlx.backends.mlx_import import mx
from bitnet_mlx.ternary import TernaryTensor
from tests.emulator import to_mlx, to_numpy
from tests.kernels.attention_cases import Case, check
from tests.kernels.twin import twin
from tests.support.random_model import random_ternary

STOCK = StockOps()
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


class Counted:
    """A runner that counts the launches of each kernel."""

    def __init__(self, runner: Callable[[Launch], list[mx.array]] = twin) -> None:
        self.runner = runner
        self.names: list[str] = []

    def __call__(self, launch: Launch) -> list[mx.array]:
        self.names.append(launch.source.name)
        return self.runner(launch)


def same(found: mx.array, expected: mx.array) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert np.array_equal(np.array(found.astype(mx.float32)), np.array(expected.astype(mx.float32)))


def arrays(n: int, k: int, lead: tuple[int, ...], scale: str, dtype: str) -> tuple[TernaryTensor, mx.array, mx.array]:
    rng = np.random.default_rng((n, k, len(lead)))
    x = mx.array(rng.standard_normal((*lead, k)).astype(np.float32) * 3).astype(DTYPES[dtype])
    residual = mx.array(rng.standard_normal((*lead, n)).astype(np.float32)).astype(DTYPES[dtype])
    return random_ternary(rng, n, k, scale), x, residual


@pytest.mark.parametrize("platform", ["metal", "cuda"])
@pytest.mark.parametrize("scale", ["tensor", "row", "group"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_quantise_and_multiply(platform: Platform, scale: str, dtype: str) -> None:
    for n, k, lead in ((5, 100, (1,)), (33, 128, (3,)), (1, 260, (1, 8)), (40, 300, (2, 3, 4)), (3, 130, (70,))):
        tensor, x, residual = arrays(n, k, lead, scale, dtype)
        runner = Counted()
        ops = KernelOps(platform, runner)
        words, factor = mx.array(tensor.words), mx.array(tensor.scale)
        ours, stock = ops.arrange(words, factor), STOCK.arrange(words, factor)
        same(ours, words)
        m = int(np.prod(lead))
        to = ops.target(ours, factor, m, k)
        codes, expected = ops.quantize(x, to), STOCK.quantize(x)
        assert codes.columns == k and codes.layout == to and codes.q.shape[:-1] == lead
        same(plain(codes).q, expected.q)
        same(plain(codes).scales, expected.scales)
        bias = mx.array(np.linspace(-1, 1, n, dtype=np.float32))
        for b, r in ((None, None), (bias, None), (None, residual), (bias, residual)):
            same(ops.linear(codes, ours, factor, b, r), STOCK.linear(expected, stock, factor, b, r))
        if to is not None:
            assert len(runner.names) == 1 + 4


@pytest.mark.parametrize("act", ["relu2", "silu"])
def test_norms_and_gates_write_the_layout_that_the_product_reads(act: str) -> None:
    rng = np.random.default_rng(1)
    for k, lead in ((100, (1, 1)), (272, (2, 3))):
        weight = mx.array(rng.uniform(0.5, 2, k).astype(np.float32))
        x = mx.array(rng.standard_normal((*lead, k)).astype(np.float32))
        gate_up = mx.array(rng.standard_normal((*lead, 2 * k)).astype(np.float32)).astype(mx.bfloat16)
        runner = Counted()
        ops = KernelOps("metal", runner)
        for to in (halves(k), Layout("plain"), None):
            pairs = (
                (ops.norm_quantize(x, weight, 1e-5, to), STOCK.norm_quantize(x, weight, 1e-5)),
                (ops.gated_quantize(gate_up, act, weight, 1e-5, to), STOCK.gated_quantize(gate_up, act, weight, 1e-5)),
                (ops.gated_quantize(gate_up, act, None, 1e-5, to), STOCK.gated_quantize(gate_up, act, None, 1e-5)),
            )
            for codes, expected in pairs:
                assert codes.layout == to and codes.dtype == expected.dtype
                same(plain(codes).q, expected.q)
                same(plain(codes).scales, expected.scales)
        assert len(runner.names) == 6


@pytest.mark.parametrize("platform", ["metal", "cuda"])
@pytest.mark.parametrize("scale", ["tensor", "row", "group"])
def test_norm_gate_and_product_in_one(platform: Platform, scale: str) -> None:
    """One row on CUDA takes one launch, unless the weight's scales are for groups."""
    rng = np.random.default_rng(3)
    for n, k, lead, act in (
        (5, 100, (1, 1), ""),
        (33, 128, (1,), "relu2"),
        (20, 300, (2, 1), "silu"),
        (9, 60000, (1,), ""),
    ):
        tensor, _, residual = arrays(n, k, lead, scale, "bfloat16")
        x = mx.array(rng.standard_normal((*lead, k * (2 if act else 1))).astype(np.float32)).astype(mx.bfloat16)
        words, factor = mx.array(tensor.words), mx.array(tensor.scale)
        bias, norm = (
            mx.array(np.linspace(-1, 1, n, dtype=np.float32)),
            mx.array(rng.uniform(0.5, 2, k).astype(np.float32)),
        )
        runner = Counted()
        ops, stock = KernelOps(platform, runner), STOCK.arrange(words, factor)
        for b, r, weight in ((None, None, norm), (bias, residual, None)):
            found = ops.fused_linear(x, words, factor, b, r, norm=weight, eps=1e-5, act=act)
            same(found, STOCK.fused_linear(x, stock, factor, b, r, norm=weight, eps=1e-5, act=act))
        one = platform == "cuda" and scale != "group" and lead[0] == 1 and k < 60000
        assert ("quantized_matvec" in runner.names) == one
        assert len(runner.names) in ((2,) if one else (0, 4))
    assert ops.fused_linear(x[:0], words, factor).shape == (0, n)


class Wary(BestGuess):
    """Kernels of one kind are off."""

    def __init__(self, platform: Platform, off: str) -> None:
        super().__init__(platform)
        self.off = off

    def allows(self, kernel: RowKernel) -> bool:
        return not kernel.question.startswith(self.off)


@pytest.mark.parametrize(
    ("off", "left"),
    [
        ("fused 5x100 tensor bfloat16 norm 1e-05 residual", ["quantize", "ternary_matvec_dp4a"]),
        ("quantiser k100", []),  # what the fused one does too may be wrong
    ],
)
def test_a_fused_kernel_that_is_off_leaves_the_separate_ones(off: str, left: list[str]) -> None:

    tensor, x, residual = arrays(5, 100, (1,), "tensor", "bfloat16")
    words, factor, norm = mx.array(tensor.words), mx.array(tensor.scale), mx.ones(100)
    runner = Counted()
    ops = KernelOps("cuda", runner, Wary("cuda", off))
    same(
        ops.fused_linear(x, words, factor, None, residual, norm=norm, eps=1e-5),
        STOCK.fused_linear(x, words, factor, None, residual, norm=norm, eps=1e-5),
    )
    assert runner.names == left


def test_the_rotary_embedding() -> None:
    rng = np.random.default_rng(2)
    for lead, rows in (((1, 1), 1), ((2, 3), 2), ((2, 3), 1)):
        qkv = mx.array(rng.standard_normal((*lead, 8 * 6)).astype(np.float32)).astype(mx.bfloat16)
        cos, sin = (mx.array(rng.uniform(-1, 1, (rows, lead[1], 3)).astype(np.float32)) for _ in "cs")
        runner = Counted()
        found = KernelOps("metal", runner).rope_kv(qkv, cos, sin, 4, 2)
        for ours, expected in zip(found, STOCK.rope_kv(qkv, cos, sin, 4, 2), strict=True):
            same(ours, expected)
        assert runner.names == ["rope_kv"]


@pytest.mark.parametrize(("dim", "room", "kernels"), [(6, 9, 1), (6, 1100, 2), (258, 9, 0)])
def test_attention_of_a_token(dim: int, room: int, kernels: int) -> None:
    """In one launch, in two, and by stock MLX where a head is too wide."""
    case = Case(4, 2, dim, room, 7, 5, dtype="bfloat16", batch=2)
    runner = Counted()
    ops = KernelOps("metal", runner)
    out, recent = ops.decode_attention(*map(to_mlx, case.inputs()), 4, 2)
    check(case, to_numpy(out), to_numpy(recent))
    assert runner.names == ["decode_attention", "decode_attention_merge"][:kernels]
    assert ops.attends(2, 4, 2, dim, room, mx.bfloat16) == bool(kernels)


def test_attention_that_is_switched_off() -> None:
    class Wary(BestGuess):
        def allows(self, kernel: RowKernel) -> bool:
            return "in shares" not in kernel.question

    runner = Counted()
    ops = KernelOps("metal", runner, Wary("metal"))
    assert ops.attends(1, 4, 2, 6, 512, mx.float32) and not ops.attends(1, 4, 2, 6, 1100, mx.float32)
    case = Case(4, 2, 6, 1100, 299, 63)
    out, recent = ops.decode_attention(*map(to_mlx, case.inputs()), 4, 2)
    check(case, to_numpy(out), to_numpy(recent))
    assert not runner.names


@pytest.mark.parametrize("scale", ["tensor", "row", "group"])
def test_activations_that_stay_floating_point(scale: str) -> None:
    """Whole numbers, so that no order of summation rounds; more than 8 rows go to stock MLX."""
    for m in (1, 3, 8, 9):
        tensor, _, residual = arrays(21, 140, (m,), scale, "bfloat16")
        x = mx.array(np.random.default_rng(m).integers(-50, 50, (m, 140)).astype(np.float32)).astype(mx.bfloat16)
        words, factor = mx.array(tensor.words), mx.array(tensor.scale)
        runner = Counted()
        found = KernelOps("metal", runner).float_linear(x, words, factor, None, residual)
        same(found, STOCK.float_linear(x, STOCK.arrange(words, factor), factor, None, residual))
        assert len(runner.names) == (m <= 8)
        runner.names.clear()
        found = KernelOps("metal", runner, Wary("metal", "float product")).float_linear(
            x, words, factor, None, residual
        )
        same(found, STOCK.float_linear(x, STOCK.arrange(words, factor), factor, None, residual))
        assert runner.names == []


def test_codes_of_another_layout_or_dtype_are_multiplied_all_the_same() -> None:
    """A caller may quantise for one product and multiply by another, or where the kernel has been switched off since."""
    tensor, x, _ = arrays(9, 200, (2,), "group", "float32")
    words, factor = mx.array(tensor.words), mx.array(tensor.scale)
    ops = KernelOps("metal", twin)
    expected = STOCK.linear(STOCK.quantize(x), STOCK.arrange(words, factor), factor)
    for layout in (halves(200), Layout("plain"), Layout("bytes"), Layout("halves", 1), Layout("halves", 2), None):
        same(ops.linear(ops.quantize(x, layout), words, factor), expected)


def test_a_weight_too_wide_for_half_mantissas_runs_on_stock_mlx() -> None:
    k = HALF_LIMIT + 128
    tensor, x, _ = arrays(2, k, (1,), "tensor", "float32")
    runner = Counted()
    ops = KernelOps("metal", runner)
    words, factor = mx.array(tensor.words), mx.array(tensor.scale)
    assert ops.target(words, factor, 1, k) is None
    assert ops.target(words, factor, 0, 100) is None
    same(ops.linear(ops.quantize(x), words, factor), STOCK.linear(STOCK.quantize(x), words, factor))
    assert KernelOps("cuda", runner).target(words, factor, 1, k) == Layout("bytes")


def test_rows_restore_and_few_values() -> None:
    tensor, x, _ = arrays(6, 5, (2,), "group", "float32")
    words, factor = mx.array(tensor.words), mx.array(tensor.scale)
    ops = KernelOps("metal", twin)
    index = mx.array([[5, 0]])
    same(ops.rows(words, factor, index, 5), STOCK.rows(STOCK.arrange(words, factor), factor, index, 5))
    same(ops.restore(ops.arrange(words, factor)), words)
    codes = ops.quantize(x, ops.target(words, factor, 2, 5))  # fewer values than a kernel may be given
    assert codes.layout is None
    same(ops.linear(codes, words, factor), STOCK.linear(STOCK.quantize(x), STOCK.arrange(words, factor), factor))
    assert ops.quantize(x[:0], halves(5)).q.shape == (0, 5)
