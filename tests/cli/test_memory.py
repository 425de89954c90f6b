"""bitnet-mlx memory: the prediction, what fits, and the run that it is held against."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from bitnet_mlx.bench.memory import Measured, usual_dtype
from bitnet_mlx.cli.main import main
from bitnet_mlx.models.precision import PRESETS
from tests.support.random_model import tiny_config

EMBEDDED_WEIGHTS, EMBEDDED_HEAD = 3217120, 3072 * 384 + 3072 * 6 * 4


def record(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 1
    return json.loads(out[0])


def test_the_embedded_model_is_predicted_without_a_weight_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitnet_mlx.checkpoint.folder import TensorTable

    def read(self: TensorTable, name: str) -> None:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(TensorTable, "array", read)
    assert main(["memory", "--context", "4096", "--backend", "cpu", "--json"]) == 0
    found = record(capsys)
    assert (found["weights"], found["head"]) == (EMBEDDED_WEIGHTS, EMBEDDED_HEAD)
    assert found["kv_cache"] == 4096 * 2 * 8 * 2 * 64 * 4
    assert found["total"] == sum(found[part] for part in ("weights", "head", "kv_cache", "activations"))
    assert (found["fits"], found["longest_context"], found["model_context"]) == (True, 1024, 1024)


def test_bits_of_head_and_cache_are_planned_with(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["memory", "--context", "1024", "--backend", "mlx", "--json"]
    assert main(command) == 0
    plain = record(capsys)
    assert main([*command, "--kv-bits", "8", "--head-bits", "4"]) == 0
    small = record(capsys)
    assert small["head"] < 0.6 * plain["head"] and small["kv_cache"] < 0.35 * plain["kv_cache"]
    assert main([*command, "--precision", "memory"]) == 0
    preset, policy = record(capsys), PRESETS["memory"]
    assert main([*command, "--kv-bits", str(policy.kv_bits), "--head-bits", str(policy.head_bits)]) == 0
    flags = record(capsys)
    assert (
        (preset["head"], preset["kv_cache"]) == (flags["head"], flags["kv_cache"]) != (plain["head"], plain["kv_cache"])
    )
    assert main([*command, "--batch", "3"]) == 0
    assert record(capsys)["kv_cache"] == 3 * plain["kv_cache"]


def test_a_run_holds_the_prediction_and_a_machine_can_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["memory", "--context", "64", "--batch", "2", "--backend", "cpu", "--memory", "8", "--run"]
    assert main([*command, "--json"]) == 0
    found = record(capsys)
    assert found["budget"] == 6 << 30
    assert found["measured_run"]["within"]
    assert found["measured_run"]["kv_cache"] == found["kv_cache"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "It fits this machine." in out
    assert "apart" in out


def test_the_runs_timeline_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "memory.html"
    assert main(["memory", "--context", "600", "--backend", "cpu", "--run", "--plot", str(picture)]) == 0
    assert "of the process" in capsys.readouterr().out or picture.stat().st_size > 1000
    text = picture.read_text()
    assert "kv cache" in text
    assert "process (right)" in text


def test_a_prediction_that_is_off_exits_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from bitnet_mlx.models.demand import MatrixSize

    monkeypatch.setattr(MatrixSize, "cpu", lambda self: self.host() * 9 // 10)
    assert main(["memory", "--context", "8", "--backend", "cpu", "--run", "--json"]) == 1
    assert record(capsys)["measured_run"]["error"] > 0.05


def test_a_small_machine_holds_a_shorter_context(capsys: pytest.CaptureFixture[str]) -> None:
    """2.17 GiB leave 2 GiB to the rest, so the process has 174 MiB, of which it takes 160 by itself."""
    assert main(["memory", "--backend", "cpu", "--memory", "2.17", "--threads", "1", "--json"]) == 0
    found = record(capsys)
    assert found["fits"] is False
    assert 0 < found["longest_context"] < 1024


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--context", "0"], "context is 0"), (["--batch", "0"], "batch is 0"), (["--context", "9" * 20], "1 to 16777216"),
     (["--batch", "9" * 20], "1 to 4096"), (["--threads", "0", "--backend", "cpu"], "[threads] 0"),
     (["--threads", "2", "--backend", "numpy"], "only cpu takes"), (["--memory", "-1"], "--memory is -1.0"),
     (["--context", "2000", "--run", "--backend", "cpu"], "takes 1 to 1024"), (["--plot", "a.png"], "give --run as well"),
     (["--run", "--plot", "a.gif"], "ends in .png or .html")],
)  # fmt: skip
def test_what_cannot_be(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", *flags]) == 2
    assert message in capsys.readouterr().err


def test_an_adapter_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", "--adapter-path", str(tmp_path)]) == 2
    assert "no adapter_config.json" in capsys.readouterr().err


def test_a_prediction_may_be_off_either_way_by_5_percent() -> None:
    for error, within in ((0.049, True), (-0.049, True), (0.051, False), (-0.051, False)):
        assert Measured(1, 1, 1, 1, 4, error, 0, 0).within == within


@pytest.mark.parametrize(
    ("stored", "activation", "engine", "want"),
    [
        ("bfloat16", "silu", "metal", "bfloat16"), ("float16", "silu", "cuda", "float16"), ("float32", "silu", "metal", "float32"),
        ("float16", "relu2", "metal", "bfloat16"), ("bfloat16", "relu2", "cpu", "float32"), ("float16", "silu", "numpy", "float32"),
    ],
)  # fmt: skip
def test_the_type_that_a_plan_takes(stored: str, activation: str, engine: str, want: str) -> None:
    """Squared ReLU can pass float16's largest number."""
    assert usual_dtype(tiny_config(dtype=stored, hidden_act=activation), engine) == want


@pytest.mark.parametrize(("engine", "code"), [("cpu", 1), ("numpy", 0)])
def test_only_engines_that_are_counted_exactly_fail_a_run(
    engine: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bitnet_mlx.bench.memory.run", lambda *_, **__: Measured(1, 1, 1, 1, 4, 0.5, 0, 0))
    assert main(["memory", "--context", "8", "--backend", engine, "--run", "--json"]) == code
    assert record(capsys)["measured_run"]["within"] is False


def test_what_a_process_held_in_mlx_before_is_not_the_models(capsys: pytest.CaptureFixture[str]) -> None:
    held = mx.zeros(16 << 20)
    mx.eval(held)
    assert main(["memory", "--context", "64", "--backend", "mlx", "--run", "--json"]) == 0
    assert record(capsys)["measured_run"]["within"] and held.size
