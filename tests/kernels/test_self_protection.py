"""A kernel that is wrong, fails or is slow is found, switched off with one warning, and the answer stays right."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bitnet_mlx.backends.cache_root import VARIABLE
from bitnet_mlx.backends.kernels import check, products, tune
from bitnet_mlx.backends.kernels.biased import BiasedProduct
from bitnet_mlx.backends.kernels.choices import Choices
from bitnet_mlx.backends.kernels.chooser import Measured
from bitnet_mlx.backends.kernels.launch import Launch
from bitnet_mlx.backends.kernels.layout import Layout, halves, parts, prepare
from bitnet_mlx.backends.kernels.ops import KernelOps
from bitnet_mlx.backends.kernels.problem import Product
from bitnet_mlx.backends.kernels.row_attention import DecodeAttention
from bitnet_mlx.backends.kernels.row_kernels import FloatProduct, Quantiser, RopeKv
from bitnet_mlx.backends.kernels.tune import Chain, Tuner
from bitnet_mlx.backends.mlx_affine import StockOps
from bitnet_mlx.backends.mlx_import import mx
from bitnet_mlx.errors import KernelWarning
from tests.kernels.twin import twin
from tests.support.random_model import random_ternary

STOCK = StockOps()


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))


class Device:
    """A runner, a timer and the questions asked of them. A kernel of ours takes 1 us, stock MLX 2, but for `slow`."""

    def __init__(self, runner: Callable[[Launch], list[mx.array]] = twin, slow: str = "never") -> None:
        self.run, self.slow = runner, slow
        self.timed: list[str] = []
        self.launched: list[str] = []

    def __call__(self, launch: Launch) -> list[mx.array]:
        self.launched.append(launch.source.name)
        return self.run(launch)

    def timer(self, label: str, chain: Chain) -> float:
        mx.eval(chain(2))
        self.timed.append(label)
        if label.startswith("stock"):
            return 2e-6
        return 5e-6 if self.slow in label else 1e-6

    def ops(self) -> KernelOps:
        """As a new process would make them."""
        chooser = Measured("metal", Tuner("metal", self, self.timer), Choices("metal", "Apple M1", "0.32.4"))
        ops = KernelOps("metal", self, chooser)
        ops.dtype = "float32"
        return ops


def corrupting(name: str, output: int = 0, word: int = 0) -> Callable[[Launch], list[mx.array]]:
    """A device on which the last value of an output of the kernels of that name is off by one, or a word of quantised
    activations is another.
    """

    def run(launch: Launch) -> list[mx.array]:
        outputs = twin(launch)
        if name in launch.source.name and output < len(outputs):
            right = outputs[output]
            wrong = np.array(right if right.dtype == mx.uint32 else right.astype(mx.float32))
            if right.dtype == mx.uint32:
                wrong[0, word] ^= 1 << 20
            else:
                wrong.flat[-1] += 1
            outputs[output] = mx.array(wrong).astype(right.dtype)
        return outputs

    return run


def failing(name: str) -> Callable[[Launch], list[mx.array]]:
    """A device whose compiler refuses the kernels of that name."""

    def run(launch: Launch) -> list[mx.array]:
        if name in launch.source.name:
            raise RuntimeError(
                "[metal::Device] Unable to build metal library from source\nprogram_source:3:5: error: no"
            )
        return twin(launch)

    return run


def answer(ops: KernelOps, m: int = 2, n: int = 12, k: int = 150, biased: bool = False) -> None:
    """Quantise, multiply and add through ops; the result is stock MLX's."""
    rng = np.random.default_rng(m)
    tensor = random_ternary(rng, n, k, "row")
    words, scale = mx.array(tensor.words), mx.array(tensor.scale)
    x = mx.array(rng.standard_normal((m, k)).astype(np.float32))
    rest = (mx.arange(n).astype(mx.float32) if biased else None, mx.ones((m, n)))
    found = ops.linear(ops.quantize(x, ops.target(words, scale, m, k)), words, scale, *rest)
    expected = STOCK.linear(STOCK.quantize(x), words, scale, *rest)
    assert np.array_equal(np.array(found), np.array(expected))


def silent(act: Callable[[], None]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        act()


def test_sound_kernels_run_and_are_measured_once() -> None:
    device = Device()
    answer(device.ops())
    assert {"ternary_matvec", "quantize"} == set(device.launched)
    asked = len(device.timed)
    assert "stock float32" in device.timed and "stock bfloat16" in device.timed
    again = device.ops()
    device.launched.clear()
    answer(again)
    assert len(device.timed) == asked and device.launched == ["quantize", "ternary_matvec"]
    answer(again, m=3)  # measured as 4 rows, and checked for 3
    assert device.ops().chooser.choices.get("product 12x150 m3 row float32").time is None  # type: ignore[attr-defined]


@pytest.mark.parametrize("device", [Device(corrupting("ternary_matvec")), Device(failing("ternary_matvec"))])
def test_a_wrong_or_failing_product_is_off_with_one_warning(device: Device) -> None:
    with pytest.warns(KernelWarning, match="product 12x150 m2 row float32 is switched off") as caught:
        answer(device.ops())
    assert len(caught) == 1
    assert ("outputs are wrong" in str(caught[0].message)) or ("error: no" in str(caught[0].message))
    device.launched.clear()
    silent(lambda: answer(device.ops()))  # remembered
    assert not device.launched
    choice = device.ops().chooser.choices.get("product 12x150 m2 row float32")  # type: ignore[attr-defined]
    assert choice.fault and choice.label is None and choice.stock == 2.0


@pytest.mark.parametrize(
    "device",
    # A code, a bias and the scale of a row of 150 in halves.
    [Device(corrupting("quantize", word=word)) for word in (0, 130, 192)] + [Device(failing("quantize"))],
)
def test_a_wrong_or_failing_quantiser_is_off_with_one_warning(device: Device) -> None:
    with pytest.warns(KernelWarning, match="quantiser k150") as caught:
        answer(device.ops())
    assert len(caught) == 1
    device.launched.clear()
    silent(lambda: answer(device.ops()))
    assert not device.launched


@pytest.mark.parametrize("slow", ["matvec", "quantiser"])
def test_a_slow_kernel_is_off_with_one_warning_and_is_no_fault(slow: str) -> None:
    device = Device(slow=slow)
    with pytest.warns(KernelWarning, match=r"takes 5.0 us, stock MLX.* 2.0 us") as caught:
        answer(device.ops())
    assert len(caught) == 1
    silent(lambda: answer(device.ops()))
    assert not any(choice.fault for choice in device.ops().chooser.choices.all().values())  # type: ignore[attr-defined]


def test_many_rows_where_stock_is_faster_are_a_choice_like_another() -> None:
    device = Device(slow="mat")
    silent(lambda: answer(device.ops(), m=30))
    choice = device.ops().chooser.choices.get("product 12x150 m16 row float32")  # type: ignore[attr-defined]
    assert choice is None or choice.label is None


def test_slower_is_as_slow_or_slower_and_measured() -> None:
    assert [tune.slower(ours, 2.0) for ours in (1.9, 2.0, 2.1, None)] == [False, True, True, False]
    assert not tune.slower(5.0, None)


def wrong_for(count: int) -> Callable[[Launch], list[mx.array]]:
    """A device whose products are wrong for as many rows of activations, or more."""

    def run(launch: Launch) -> list[mx.array]:
        bad = "ternary" in launch.source.name and launch.outputs[0][0][0] >= count
        return corrupting("ternary")(launch) if bad else twin(launch)

    return run


def test_a_kernel_that_is_wrong_for_a_number_that_was_not_timed_is_off_for_it() -> None:
    device = Device(wrong_for(3))
    device.run = lambda launch: wrong_for(3)(launch) if launch.outputs[0][0][0] == 3 else twin(launch)
    with pytest.warns(KernelWarning, match="product 12x150 m3 row float32 is switched off"):
        answer(device.ops(), m=3)
    silent(lambda: answer(device.ops(), m=4))


def test_rows_beyond_those_that_numpy_checks_are_held_against_stock_mlx() -> None:
    device = Device(wrong_for(68))
    choice = Tuner("metal", device, device.timer).product(Product(12, 150, 512, "row", "float32"))
    assert choice.label is None and choice.fault and "outputs are wrong" in choice.reason


def test_one_wrong_variant_leaves_the_others(caplog: pytest.LogCaptureFixture) -> None:
    """Two rows a simdgroup are wrong on this chip; the fastest of the sound ones runs."""

    def run(launch: Launch) -> list[mx.array]:
        return corrupting("ternary_matvec")(launch) if ("R", 2) in launch.template else twin(launch)

    device = Device(run, slow="rows=4")
    ops = device.ops()
    silent(lambda: answer(ops))
    choice = ops.chooser.choices.get("product 12x150 m2 row float32")  # type: ignore[attr-defined]
    assert choice.fault and "rows=2" in choice.reason and choice.label and "rows=2" not in choice.label
    assert "rows=4" not in choice.label and choice.time == 1.0
    assert "product 12x150 m2 row float32: matvec(rows=2" in caplog.text


def test_the_fastest_variant_is_confirmed_without_a_residual_too() -> None:
    """Wrong in the model's dtype without a residual alone, which no timed call shows."""

    def run(launch: Launch) -> list[mx.array]:
        bad = (
            ("R", 4) in launch.template
            and ("T", "bfloat16") in launch.template
            and ("RESIDUAL", False) in launch.template
        )
        return corrupting("ternary_matvec")(launch) if bad else twin(launch)

    choice = Tuner("metal", Device(run), Device().timer).product(Product(12, 8, 2, "row", "bfloat16"))
    assert choice.fault and "rows=4" in choice.reason and choice.label and "rows=4" not in choice.label


def test_prepare_asks_before_the_first_step() -> None:
    device = Device()
    ops = device.ops()
    ops.prepare({(12, 150, "row"), (9, 150, "tensor")}, "float32")
    known = set(ops.chooser.choices.all())  # type: ignore[attr-defined]
    assert {"product 12x150 m1 row float32", "product 9x150 m1 tensor float32"} <= known
    timed = len(device.timed)
    answer(ops, m=1)
    assert not [label for label in device.timed[timed:] if "matvec" in label]


@pytest.mark.parametrize("m", [1, 2, 100])
def test_a_product_that_is_wrong_with_a_bias_alone_is_off_where_a_model_has_one(m: int) -> None:
    def run(launch: Launch) -> list[mx.array]:
        return corrupting("ternary_mat")(launch) if ("BIAS", True) in launch.template else twin(launch)

    device = Device(run)
    silent(lambda: answer(device.ops(), m=m))
    with pytest.warns(
        KernelWarning, match=r"biased product 12x150 m\d+ row float32 .*is switched off.* outputs are wrong"
    ):
        answer(device.ops(), m=m, biased=True)
    device.launched.clear()
    silent(lambda: answer(device.ops(), m=m, biased=True))  # remembered
    assert not any("ternary_mat" in name for name in device.launched)
    silent(lambda: answer(Device().ops(), m=m))


def test_a_label_of_other_times_is_measured_again() -> None:
    device = Device()
    answer(device.ops())
    choices = Choices("metal", "Apple M1", "0.32.4")
    question = "product 12x150 m2 row float32"
    known = choices.get(question)
    assert known is not None
    choices.put(question, tune.Choice("a kernel that is no more", time=1.0))
    answer(device.ops())
    assert Choices("metal", "Apple M1", "0.32.4").get(question) == known


def row_kernels(dtype: str) -> list[object]:
    layouts = (halves(136), Layout("plain"), Layout("bytes"))
    quantisers = [
        Quantiser(136, layout, dtype, norm, act, 1e-5)
        for layout in layouts
        for norm in (False, True)
        for act in ("", "relu2", "silu")
    ]
    attention = [DecodeAttention.of(1, 4, 2, 6, room, 64, dtype) for room in (100, 2000)]
    product = Product(9, 140, 2, "group", dtype)
    biased = [BiasedProduct(product, candidate) for candidate in products.candidates("metal", 9, 140, 2)[:2]]
    floats = [FloatProduct(9, 140, 2, "group", dtype, bias) for bias in (False, True)]
    return [*quantisers, RopeKv(4, 2, 6, dtype), *attention, *floats, *biased]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_row_kernel_is_checked_and_chained(dtype: str) -> None:
    for kernel in row_kernels(dtype):
        device = Device()
        assert kernel.check(device).exact, kernel.question  # type: ignore[attr-defined]
        tuner = Tuner("metal", device, device.timer)
        assert tuner.row_kernel(kernel).label == "on"  # type: ignore[arg-type]
        places = [(0, 0), (1, 0)] if isinstance(kernel, (RopeKv, DecodeAttention)) else [(0, 0)]
        if isinstance(kernel, Quantiser):
            places += [(0, kernel.layout.code_words(kernel.k))]
        for output, word in places:
            broken = Tuner("metal", Device(corrupting("", output, word)), device.timer)
            assert broken.row_kernel(kernel).fault, kernel.question  # type: ignore[arg-type]


def test_the_timer_measures_and_the_tuner_loses_patience() -> None:
    calls = []

    def chain(count: int) -> mx.array:
        calls.append(count)
        return mx.ones(4) * count

    assert 0 < tune.seconds("x", chain) < 1
    assert calls[:2] == [2, 4] and len(calls) == 9 and 4 <= calls[-1] <= 64
    ticks = iter(range(0, 10_000, 10))  # each look at the clock costs ten seconds
    device = Device()
    Tuner("metal", device, device.timer, lambda: float(next(ticks))).product(Product(12, 150, 1, "row", "float32"))
    assert len([label for label in device.timed if not label.startswith("stock")]) == 3


def test_buckets() -> None:
    assert [tune.bucket(m) for m in (1, 2, 3, 4, 5, 8, 9, 16, 31, 33, 64, 180, 182, 1000, 1100, 5000)] == [
        1, 2, 4, 4, 8, 8, 16, 16, 16, 64, 64, 64, 512, 512, 2048, 2048,
    ]  # fmt: skip


def test_ties_that_a_chip_rounds_otherwise_are_counted_apart() -> None:
    """A quantiser whose codes flip at a tie stays on; one that is off by more is wrong."""
    kernel = Quantiser(136, Layout("plain"), "float32")

    def flipping(by: int) -> Callable[[Launch], list[mx.array]]:
        def run(launch: Launch) -> list[mx.array]:
            s = parts(np.array(twin(launch)[0]), Layout("plain"), 136)[2]
            x = np.array(launch.inputs[0])
            values = x * s[:, None]
            tie = np.abs(values - np.trunc(values)) == 0.5
            q = np.clip(np.where(tie, np.trunc(values) + by * np.sign(values), np.rint(values)), -128, 127)
            return [mx.array(prepare(q.astype(np.int8), s, Layout("plain")))]

        return run

    verdict = kernel.check(flipping(1))
    assert verdict.sound and not verdict.exact and verdict.ties > 50 and "ties" in verdict.text
    assert not kernel.check(flipping(2)).sound
    assert check.Verdict(3, error="x").text == "it fails: x"
