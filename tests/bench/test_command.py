"""What `bench` does with its options and its figures: exit codes, what reaches a measurement, what is refused."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bitnet_mlx.bench import copying, matmul, precision, regression, stamp
from bitnet_mlx.bench.comparison import measure as comparison
from bitnet_mlx.bench.comparison.footprint import decide_transfer
from bitnet_mlx.cli import bench
from bitnet_mlx.cli.main import build_parser, main


def code(line: str) -> int:
    return bench.run(build_parser("bench").parse_args(line.split()))


@pytest.mark.parametrize("good", [True, False])
def test_what_is_wrong_exits_1(good: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (matmul, comparison, regression):
        monkeypatch.setattr(module, "lines", lambda _: ())
    monkeypatch.setattr(matmul, "measure", lambda *_: {"exact": good})
    monkeypatch.setattr(comparison, "measure", lambda _: {"equality": {"ok": good}})
    monkeypatch.setattr(regression, "measure", lambda _: ({}, None))
    monkeypatch.setattr(regression, "find_baseline", lambda *_: {})
    monkeypatch.setattr(regression, "compare", lambda *_: {"regressed": [] if good else ["decode"]})
    for line in ("matmul", "backends", "regression --compare x"):
        assert code(line) == (0 if good else 1), line


def test_what_reaches_a_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(precision, "lines", lambda _: ())
    monkeypatch.setattr(precision, "measure", lambda *given, **more: asked.append((given, more)) or {})
    monkeypatch.setattr(regression, "lines", lambda _: ())
    monkeypatch.setattr(regression, "measure", lambda options: (asked.append(options) or {}, None))
    monkeypatch.setattr(matmul, "lines", lambda _: ())
    monkeypatch.setattr(matmul, "measure", lambda *given: asked.append(given) or {"exact": True})
    assert code("precision --backend cpu --model m --text t.txt --tokens 3 --repeats 2") == 0
    assert code("matmul --backend metal --rows 1,8") == 0
    assert asked == [(("cpu", "m", "t.txt", 3), {"repeats": 2}), ("metal", (1, 8))]
    assert code("regression --preset 2b4t --model m --layers 2 --head-bits 16 --dtype bfloat16 --threads 3") == 0
    found = asked[-1]
    assert (found.preset, found.model, found.layers, found.head_bits, found.dtype) == ("2b4t", "m", 2, 16, "bfloat16")
    assert (found.threads, found.prompt, found.tokens, found.repeats) == (3, 64, 16, 5)


def test_a_comparison_goes_with_regression_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "decode", "--compare", "x.jsonl"]) == 2
    assert "--compare goes with regression, not with decode" in capsys.readouterr().err


def test_a_records_command_tells_nothing_of_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/home/somebody/bin/bitnet-mlx", "bench", "decode"])
    assert stamp.command() == stamp.stamp("numpy")["command"] == "bitnet-mlx bench decode"


def test_a_copy_reads_and_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """8000 bytes read and as many written, in two seconds and then in one: the best counts."""
    monkeypatch.setattr(copying, "time", SimpleNamespace(perf_counter=iter((0.0, 2.0, 5.0, 6.0)).__next__))
    assert copying.copy_bandwidth(1, size=8000, repeats=2) == 16000.0


def test_a_records_commit_says_whether_files_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        who = ("-c", "user.name=n", "-c", "user.email=e@example.org")
        return subprocess.run(["git", *who, *words], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    module = tmp_path / "bitnet_mlx" / "bench" / "stamp.py"
    monkeypatch.setattr(stamp, "__file__", str(module))
    assert stamp.commit() is None, "installed, not a source tree"
    git("init", "-q")
    module.parent.mkdir(parents=True)
    module.write_text("one")
    git("add", "-A")
    git("commit", "-qm", "first")
    assert stamp.commit() == git("rev-parse", "HEAD").strip()
    module.write_text("two")
    assert stamp.commit() == git("rev-parse", "HEAD").strip() + "-dirty"


def test_only_mlx_may_hold_the_weights_a_second_time() -> None:
    for engine, copied, ok in (("cpu", 50e6, False), ("cpu", 1e6, True), ("mlx", 100e6, True), ("mlx", 140e6, False)):
        found = decide_transfer({"weight_bytes": 100e6, "engines": {engine: {"copied_bytes": copied}}})
        assert found.ok is ok and found.name == ("no needless copy" if ok else f"{engine} copies")
