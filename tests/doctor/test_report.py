"""What doctor calls right and wrong, and how it says so."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bitnet_mlx import api
from bitnet_mlx.doctor import engines
from bitnet_mlx.doctor.products import Shape, _report
from bitnet_mlx.doctor.report import EngineReport, KernelReport, Machine, ProductReport, Report, SwitchedOff
from bitnet_mlx.doctor.table import table
from bitnet_mlx.errors import BackendError

SOUND = Report("1", "3.12", Machine("macOS", "arm64", "Apple M1"), {}, "metal", "here", [
    EngineReport("numpy", True, exact=True, worst=0.0, same_tokens=True), EngineReport("cuda", False, "no device"),
], [ProductReport("metal", 3, 10, 1, True, "exact")], [KernelReport("metal", "rope", True, "exact")],
    [SwitchedOff("metal", "slow", "it takes longer", False)])  # fmt: skip


def test_one_fault_of_any_part_is_a_fault() -> None:
    assert SOUND.ok and SOUND.record()["ok"] and "all engines and kernels agree" in table(SOUND)
    faults = (
        replace(SOUND, engines=[*SOUND.engines, EngineReport("mlx", True, exact=False, worst=2.0, ok=False)]),
        replace(SOUND, products=[*SOUND.products, ProductReport("cpu", 3, 10, 1, False, "1 of 3 outputs are wrong")]),
        replace(SOUND, kernels=[*SOUND.kernels, KernelReport("metal", "attention", False, "2 of 9 outputs are wrong")]),
        replace(SOUND, switched_off=[SwitchedOff("metal", "wrong", "it is wrong", True)]),
    )
    for report in faults:
        assert not report.ok and not report.record()["ok"] and "something is wrong on this machine" in table(report)


def test_a_wrong_product_is_told_as_wrong() -> None:
    wrong = replace(SOUND, products=[ProductReport("cpu", 3, 10, 1, False, "1 of 3 outputs are wrong")])
    assert "WRONG: 1 of 3 outputs are wrong" in table(wrong) and "WRONG" not in table(SOUND)


def test_an_engine_that_does_not_start_is_a_fault_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(**_: object) -> None:
        raise BackendError("[cpu] no threads")

    monkeypatch.setattr(api, "load", fails)
    report = engines._compare("cpu", [1], np.ones((1, 3)))
    assert (report.ok, report.exact, report.reason) == (False, None, "[cpu] no threads")
    lines = table(replace(SOUND, engines=[report])).splitlines()
    assert "cpu    failed: [cpu] no threads" in lines


def test_what_is_told_of_an_engine() -> None:
    def line(**values: object) -> str:
        found = EngineReport("mlx", True, **{"exact": False, "worst": 0.02, "same_tokens": True, **values})  # type: ignore[arg-type]
        return next(text for text in table(replace(SOUND, engines=[found])).splitlines() if text.startswith("mlx"))

    assert line() == "mlx    close: within 2.0e-02 of the logits' spread, the same tokens"
    assert line(same_tokens=False).endswith("other tokens at near-ties")
    assert line(ok=False, worst=3.0).startswith("mlx    WRONG: within 3.0e+00")
    assert line(exact=True) == "mlx    the reference's bits"


def test_ratios_and_shares_of_a_product() -> None:
    """Stock MLX takes three times as long; 2 bits of 1e6 weights in 10 us are 25 GB/s, half of what a copy reaches."""
    y = np.ones((1, 1000), np.float32)
    found = _report("cpu", Shape(1000, 1000, "row"), y, y, 1e-5, 3e-5, 50.0)
    assert (found.exact, found.text) == (True, "exact")
    assert (found.time, found.to_float32, found.share) == pytest.approx((10.0, 3.0, 0.5))
    wrong = _report("cpu", Shape(1000, 1000, "row"), y, y + np.eye(1, 1000, dtype=np.float32), 1e-5, None, None)
    assert (wrong.exact, wrong.text, wrong.to_float32, wrong.share) == (
        False,
        "1 of 1000 outputs are wrong",
        None,
        None,
    )
    many = _report("cpu", Shape(1000, 1000, "row"), np.ones((2, 1000)), np.ones((2, 1000)), 1e-5, 3e-5, 50.0)
    assert many.share is None
