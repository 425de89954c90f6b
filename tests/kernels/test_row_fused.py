"""The product that quantises its own row: checked, timed against the two kernels that it replaces, off where it should be."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bitnet_mlx.backends.cache_root import VARIABLE
from bitnet_mlx.backends.kernels.choices import Choice, Choices
from bitnet_mlx.backends.kernels.chooser import Measured
from bitnet_mlx.backends.kernels.launch import Launch
from bitnet_mlx.backends.kernels.ops import KernelOps
from bitnet_mlx.backends.kernels.products import candidates
from bitnet_mlx.backends.kernels.row_fused import FusedProduct
from bitnet_mlx.backends.kernels.row_kernels import Quantiser
from bitnet_mlx.backends.kernels.tune import Chain, Tuner
from bitnet_mlx.backends.mlx_affine import StockOps
from bitnet_mlx.backends.mlx_import import mx
from bitnet_mlx.errors import KernelWarning
from tests.kernels.twin import twin
from tests.support.random_model import random_ternary

FUSED, SEPARATE = "quantized_matvec", ["quantize", "ternary_matvec_dp4a"]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))


def kernel(
    act: str = "", norm: bool = True, scale: str = "row", dtype: str = "bfloat16", runner: Callable[..., object] = twin
) -> FusedProduct:
    separate = candidates("cuda", 12, 150, 1)[0]
    quantiser = Quantiser(150, separate.layout, dtype, norm, act, 1e-5)
    return FusedProduct(quantiser, separate, 12, scale, act == "silu", act != "silu", runner)  # type: ignore[arg-type]


def corrupting(launch: Launch) -> list[mx.array]:
    """The last output of the fused kernel is another number."""
    outputs = twin(launch)
    if launch.source.name == FUSED:
        values = np.array(outputs[0].astype(mx.float32))
        values[0, -1] += 1 + abs(values[0, -1])
        outputs[0] = mx.array(values).astype(outputs[0].dtype)
    return outputs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("act", "norm", "scale"), [("", True, "row"), ("relu2", True, "tensor"), ("silu", False, "row")]
)
def test_checked_and_timed_against_the_kernels_that_it_replaces(act: str, norm: bool, scale: str, dtype: str) -> None:
    launched: dict[bool, list[str]] = {True: [], False: []}

    def runner(fused: bool) -> Callable[[Launch], list[mx.array]]:
        def run(launch: Launch) -> list[mx.array]:
            launched[fused].append(launch.source.name)
            return twin(launch)

        return run

    one = kernel(act, norm, scale, dtype, runner(False))
    assert one.check(runner(True)).exact and set(launched[True]) == {FUSED} and not launched[False]
    ours, theirs = one.chain(runner(True), 3), one.chain(None, 3)
    assert np.array_equal(np.array(ours.astype(mx.float32)), np.array(theirs.astype(mx.float32)))
    assert launched[False] == 3 * SEPARATE
    assert not one.check(corrupting).sound


def ops(runner: Callable[[Launch], list[mx.array]], fused: float) -> KernelOps:
    """On a machine where kernels of ours take 1 us, stock MLX and the separate kernels 2, and the fused one `fused`."""

    def timer(label: str, chain: Chain) -> float:
        mx.eval(chain(2))
        return 2e-6 if label.startswith("stock") else fused * 1e-6 if label.startswith("fused") else 1e-6

    chooser = Measured("cuda", Tuner("cuda", runner, timer), Choices("cuda", "a chip", "0.32.4"))
    return KernelOps("cuda", runner, chooser)


def answer(ops: KernelOps) -> Choice | None:
    """A row through ops is stock MLX's; returns what was chosen."""
    rng = np.random.default_rng(5)
    tensor = random_ternary(rng, 12, 150, "row")
    words, scale, norm = mx.array(tensor.words), mx.array(tensor.scale), mx.ones(150)
    x = mx.array(rng.standard_normal((1, 150)).astype(np.float32)).astype(mx.bfloat16)
    expected = StockOps().fused_linear(x, words, scale, norm=norm, eps=1e-5)
    assert np.array_equal(
        np.array(ops.fused_linear(x, words, scale, norm=norm, eps=1e-5).astype(mx.float32)),
        np.array(expected.astype(mx.float32)),
    )
    return Choices("cuda", "a chip", "0.32.4").get("fused 12x150 row bfloat16 norm 1e-05")


@pytest.mark.parametrize(("time", "label"), [(1.0, "on"), (3.0, None)])
def test_a_slower_one_is_off_without_a_warning(time: float, label: str | None) -> None:
    names: list[str] = []

    def run(launch: Launch) -> list[mx.array]:
        names.append(launch.source.name)
        return twin(launch)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choice = answer(ops(run, time))
        names.clear()
        answer(ops(run, time))  # remembered
    assert choice is not None and choice.label == label and not choice.fault and choice.stock == 2.0
    assert names == ([FUSED] if label else SEPARATE)
    assert label or "our separate kernels 2.0 us" in choice.reason


def test_a_wrong_one_is_off_with_a_warning() -> None:
    with pytest.warns(KernelWarning, match="our separate kernels, of the same numbers"):
        choice = answer(ops(corrupting, 1.0))
    assert choice is not None and choice.fault
