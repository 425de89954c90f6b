"""KernelOps by the kernels' own text on the emulated grid: StockOps' bits; and a fault planted in a text is found there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitnet_mlx.backends.cache_root import VARIABLE
from bitnet_mlx.backends.kernels.choices import Choices
from bitnet_mlx.backends.kernels.chooser import Measured
from bitnet_mlx.backends.kernels.launch import Launch
from bitnet_mlx.backends.kernels.layout import Layout, halves
from bitnet_mlx.backends.kernels.ops import KernelOps
from bitnet_mlx.backends.kernels.row_attention import both
from bitnet_mlx.backends.kernels.row_kernels import FloatProduct, Quantiser, RopeKv
from bitnet_mlx.backends.kernels.tune import Chain, Tuner
from bitnet_mlx.backends.mlx_affine import StockOps
from bitnet_mlx.backends.mlx_import import mx
from bitnet_mlx.errors import KernelWarning
from tests.emulator import emulate, runner, to_mlx, to_numpy
from tests.kernels.test_ops import arrays, same

STOCK = StockOps()


@pytest.mark.parametrize(("scale", "dtype"), [("tensor", "bfloat16"), ("row", "float32"), ("group", "bfloat16")])
def test_every_operation_gives_the_bits_of_stock_mlx(scale: str, dtype: str) -> None:
    for n, k, lead in ((33, 260, (1, 3)), (9, 136, (2, 5))):
        tensor, x, residual = arrays(n, k, lead, scale, dtype)
        ops = KernelOps("metal", runner)
        words, factor = mx.array(tensor.words), mx.array(tensor.scale)
        stock = STOCK.arrange(words, factor)
        weight = mx.array(np.linspace(0.5, 2, k, dtype=np.float32))
        gate_up = mx.concatenate([x, x[..., ::-1] * 0.25], axis=-1)
        to = ops.target(words, factor, lead[0] * lead[1], k)
        for found, expected in (
            (ops.quantize(x, to), STOCK.quantize(x)),
            (ops.norm_quantize(x, weight, 1e-5, to), STOCK.norm_quantize(x, weight, 1e-5)),
            (
                ops.gated_quantize(gate_up, "relu2", weight, 1e-5, to),
                STOCK.gated_quantize(gate_up, "relu2", weight, 1e-5),
            ),
        ):
            y = ops.linear(found, words, factor, None, residual)
            same(y, STOCK.linear(expected, stock, factor, None, residual))


def test_every_row_kernel_passes_its_own_check() -> None:
    kernels: list[Any] = [
        Quantiser(260, layout, "bfloat16", True, "relu2", 1e-5) for layout in (halves(260), Layout("plain"))
    ]
    kernels += [Quantiser(136, halves(136), "float32"), Quantiser(136, halves(136), "float32", False, "silu")]
    kernels += [
        RopeKv(4, 2, 6, "bfloat16"),
        *both(4, 2, 6, "bfloat16"),
        *both(3, 1, 64, "float32"),
        FloatProduct(9, 140, 2, "group", "bfloat16"),
        FloatProduct(9, 128, 1, "row", "float32"),
    ]
    for kernel in kernels:
        verdict = kernel.check(runner)
        assert verdict.exact, (kernel.question, verdict.text)


class Planted:
    """The emulated grid with a fault in the text of the kernels of one name: (name, what to replace, by what)."""

    def __init__(self, name: str, old: str, new: str) -> None:
        self.name, self.edit = name, (old, new)

    def __call__(self, launch: Launch) -> list[mx.array]:
        plain = replace(launch, inputs=tuple(to_numpy(x) for x in launch.inputs))
        edit = self.edit if launch.source.name == self.name else None
        try:
            return [to_mlx(y) for y in emulate(plain, edit=edit)]
        except AssertionError as error:  # what the emulator refuses or catches; MLX raises this class
            raise RuntimeError(str(error)) from error


@pytest.mark.parametrize(
    "edit",
    [
        ("old = lengths[0]", "old = lengths[0] + 1"),
        ("count = old + held", "count = old + held - 1"),
        ("slot < held)", "slot + 1 < held)"),
        ("power_of_two(score[u][q] - high)", "power_of_two(0.9f * (score[u][q] - high))"),
    ],
)
def test_the_check_of_attention_sees_a_fault(edit: tuple[str, str]) -> None:
    for kernel in both(4, 2, 6, "bfloat16"):
        assert not kernel.check(Planted("decode_attention", *edit)).sound


def timer(label: str, chain: Chain) -> float:
    """Stock MLX takes twice as long as any kernel, which is not run again."""
    return 2e-6 if label.startswith("stock") else 1e-6


@pytest.mark.parametrize(
    ("planted", "question"),
    [
        (Planted("ternary_matvec", "0x43004300u", "0x42004200u"), "product"),
        (Planted("quantize", "mul_rn(p[i], factor)", "mul_rn(p[i], 0.98f * factor)"), "quantiser"),
        (Planted("quantize", "for (", "fro ("), "quantiser"),
    ],
)
def test_a_fault_in_a_text_switches_the_kernel_off_and_the_answer_stays_right(
    planted: Planted, question: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    tensor, x, residual = arrays(6, 136, (1,), "row", "float32")
    words, factor = mx.array(tensor.words), mx.array(tensor.scale)
    choices = Choices("metal", "Apple M1", "0.32.4")
    # A clock that runs away, so that only a few variants are tried.
    ticks = iter(range(0, 100_000, 100))
    tuner = Tuner("metal", planted, timer, lambda: float(next(ticks)))
    ops = KernelOps("metal", planted, Measured("metal", tuner, choices))
    ops.dtype = "float32"
    with pytest.warns(KernelWarning, match=question) as caught:
        y = ops.linear(ops.quantize(x, ops.target(words, factor, 1, 136)), words, factor, None, residual)
    assert len(caught) == 1
    same(y, STOCK.linear(STOCK.quantize(x), words, factor, None, residual))
    faults = [name for name, choice in choices.all().items() if choice.fault]
    assert len(faults) == 1 and faults[0].startswith(question)
