"""doctor on a GPU, which is stood in for by the reference: what it says of sound, wrong, slow and missing kernels."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from bitnet_mlx import backends
from bitnet_mlx.api import embedded_model
from bitnet_mlx.backends import metal, mlx_device
from bitnet_mlx.backends.cache_root import VARIABLE
from bitnet_mlx.backends.kernels.choices import Choice, Choices
from bitnet_mlx.backends.kernels.chooser import Measured
from bitnet_mlx.backends.kernels.ops import KernelOps
from bitnet_mlx.backends.kernels.tune import Tuner
from bitnet_mlx.cli.main import main
from bitnet_mlx.doctor import Report, products, table
from bitnet_mlx.doctor.kernels_mlx import KernelDoctor
from bitnet_mlx.doctor.machine import emulates_bfloat16
from bitnet_mlx.doctor.products import Shape
from bitnet_mlx.doctor.report import Machine
from bitnet_mlx.errors import ConfigError, KernelWarning
from bitnet_mlx.models.decoder_mlx import model_dtype
from tests.kernels.test_self_protection import Device, corrupting, failing
from tests.support.random_model import tiny_config

SMALL = (Shape(33, 136, "row"), Shape(40, 264, "tensor"))
ROWS = (1, 2, 8, 16, 70)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))


def measured(device: Device) -> Measured:
    return Measured("metal", Tuner("metal", device, device.timer), Choices("metal", "Apple M1 Pro", "0.32.4"))


def examined(device: Device) -> Report:
    here = Machine("macOS", "arm64", "Apple M1 Pro", 16, 32 << 30, 180.0, 200.0, "a wheel")
    doctor = KernelDoctor(measured(device), here, lambda text: None)
    report = Report("0.1.0", "3.12", here, {"mlx": "0.32.4"}, "metal", "MLX computes on an Apple GPU here", [])
    report.products = doctor.products(SMALL, ROWS)
    report.kernels = doctor.row_kernels(SMALL)
    report.switched_off = doctor.switched_off()
    return report


def test_a_gpu_that_rounds_float32_is_told() -> None:
    assert mlx_device.keeps_float32(), "the CPU takes all 24 bits"
    for keeps, told in ((True, False), (None, False), (False, True)):
        here = Machine("macOS", "arm64", "Apple M5", keeps_float32=keeps)
        assert ("MLX_ENABLE_TF32=0" in table(Report("0.1.0", "3.12", here, {}, "metal", "here", []))) is told


@pytest.mark.parametrize(
    ("chip", "told"),
    [
        ("Apple M1", True), ("Apple M2 Ultra", True), ("Apple M3 Max", False), ("Apple M10", False), ("Apple M4", False),
        ("NVIDIA H200", False),
    ],
)  # fmt: skip
def test_a_gpu_without_bfloat16_of_its_own_is_told(chip: str, told: bool) -> None:
    assert emulates_bfloat16(chip) is told
    here = Machine("macOS", "arm64", chip, emulates_bfloat16=emulates_bfloat16(chip))
    text = table(Report("0.1.0", "3.12", here, {}, "metal", "here", []))
    assert ("--dtype float16 avoids that" in text) is told


def test_what_is_told_of_float16_holds() -> None:
    """A family that it is advised for takes it, and the one that it is not refuses."""
    assert model_dtype(tiny_config(model_type="llama", hidden_act="silu", sub_norms=False), "float16") == "float16"
    with pytest.raises(ConfigError, match="squared ReLU"):
        model_dtype(tiny_config(), "float16")


def test_sound_kernels() -> None:
    report = examined(Device())
    assert report.ok and not report.switched_off
    assert [(p.n, p.m) for p in report.products] == [(n, m) for n in (33, 40) for m in ROWS]
    for p in report.products:
        assert p.exact and p.time == 1.0 and p.to_float32 == p.to_bfloat16 == 2.0 and p.kernel
    first = report.products[0]
    assert first.share == pytest.approx(33 * 136 / 4 / 1e-6 / 180e9) and first.predicted == 1.0
    assert all(kernel.text == "exact" for kernel in report.kernels)
    assert {kernel.name.split()[0] for kernel in report.kernels} == {"quantiser", "rope", "attention", "float"}
    text = table(report)
    assert "16 GPU cores" in text and "of nominally 200" in text and "all engines and kernels agree" in text
    json.dumps(report.record())


@pytest.mark.parametrize("device", [Device(corrupting("ternary")), Device(failing("ternary"))])
def test_a_wrong_product_kernel_is_a_fault_and_stock_mlx_is_right(device: Device) -> None:
    with pytest.warns(KernelWarning):
        report = examined(device)
    assert not report.ok and all(p.exact and p.kernel is None for p in report.products)
    assert {off.fault for off in report.switched_off} == {True}
    assert "stock: matvec(" in table(report) and "something is wrong" in table(report)


def test_a_wrong_quantiser_is_a_fault() -> None:
    with pytest.warns(KernelWarning):
        report = examined(Device(corrupting("quantize")))
    wrong = [kernel for kernel in report.kernels if not kernel.sound]
    assert not report.ok and wrong and all("wrong" in kernel.text for kernel in wrong)
    assert all(p.exact for p in report.products)


def test_a_slow_kernel_is_named_and_is_no_fault() -> None:
    with pytest.warns(KernelWarning):
        report = examined(Device(slow="("))
    assert report.ok
    off = [off.name for off in report.switched_off]
    assert "product 33x136 m1 row bfloat16" in off and not any("m16" in name for name in off)
    slow = next(p for p in report.products if p.m == 1)
    assert slow.kernel is None and slow.to_float32 == 1.0 and "takes 5.0 us" in slow.reason


def test_a_kernel_that_breaks_after_it_was_chosen_is_found() -> None:
    """What was remembered is checked again, with the right answer known."""
    assert examined(Device()).ok
    report = examined(Device(corrupting("")))
    assert not report.ok and not any(p.exact for p in report.products)
    assert not any(kernel.sound for kernel in report.kernels)


def test_a_variant_that_is_wrong_is_a_fault_though_another_runs() -> None:
    chooser = measured(Device())
    chooser.choices.put("product 3x10 m1 row bfloat16", Choice("matvec(rows=4)", "matvec(rows=2): wrong", fault=True))
    here = Machine("macOS", "arm64", "Apple M1 Pro")
    (off,) = KernelDoctor(chooser, here, lambda text: None).switched_off()
    assert (off.name, off.fault) == ("product 3x10 m1 row bfloat16, some variants", True)


def test_a_warning_is_one_plain_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    assert main(["inspect", str(embedded_model())]) == 0  # any command sets it
    assert warnings.formatwarning(KernelWarning("it is off"), KernelWarning, "a.py", 3) == "warning: it is off\n"
    assert "a.py:3: UserWarning: other" in warnings.formatwarning(UserWarning("other"), UserWarning, "a.py", 3)


def test_the_command_on_a_machine_with_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Metal is there, as far as the package can see: every engine, metal too, and kernels."""
    device = Device()
    chooser = measured(device)
    monkeypatch.delenv(VARIABLE)  # the cpu engine need not be compiled anew
    monkeypatch.setattr(metal, "missing", lambda: None)
    monkeypatch.setattr(metal, "make_ops", lambda: KernelOps("metal", device))
    monkeypatch.setattr(mlx_device, "measured", lambda platform: chooser)
    monkeypatch.setattr(mlx_device, "copy_bandwidth", lambda: 100.0)
    monkeypatch.setattr(products, "SHAPES", SMALL)
    monkeypatch.setattr("bitnet_mlx.doctor.kernels_mlx.MANY_ROWS", 70)
    assert backends.choose().name == "metal"
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    engines = {engine["name"]: engine for engine in found["engines"]}
    assert engines["metal"]["ok"] and engines["metal"]["available"] and found["chosen"] == "metal"
    assert {p["backend"] for p in found["products"]} == {"metal"} and found["kernels"] and not found["switched_off"]
    prompt = ["--prompt", "def f(", "--max-tokens", "4", "--temp", "0", "--dtype", "float32"]
    texts = []
    for name in ("metal", "mlx"):
        assert main(["generate", "--backend", name, *prompt]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and "quantize" in device.launched
