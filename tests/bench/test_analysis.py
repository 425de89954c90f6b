"""bench analysis: seven parts measured on the real engine; a planted fault flips each verdict."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from bitnet_mlx.backends.cpu_jit import threads
from bitnet_mlx.bench.analysis import bytes_held, devices, scaling, time_spent
from bitnet_mlx.bench.analysis.measure import DECIDE, lines, measure
from bitnet_mlx.bench.comparison.engines import made, prompt_ids
from bitnet_mlx.bench.decode import DecodeOptions
from bitnet_mlx.bench.verdicts import judged
from bitnet_mlx.cli.main import main
from bitnet_mlx.formats.dense import GroupedRows
from tests.bench import subjects
from tests.bench.test_backends import recorded

PROMPT = prompt_ids(12, 67)


@pytest.mark.parametrize("name", DECIDE)
def test_the_record_of_a_real_machine_is_decided_by_its_figures(name: str) -> None:
    figures = recorded("analysis.jsonl")[name]
    verdict = DECIDE[name](figures)
    assert (verdict.ok, verdict.name) == (figures["ok"], figures["verdict"])


@pytest.mark.parametrize("name", ["memory", "allocation", "devices", "scaling"])
def test_the_record_of_a_real_machine_is_sound(name: str) -> None:
    assert recorded("analysis.jsonl")[name]["ok"]


@pytest.mark.parametrize("engine", subjects.ENGINES)
def test_a_leak_is_found(engine: str) -> None:
    held = subjects.weights()
    sound = judged(bytes_held.memory(subjects.maker(held)(engine), PROMPT, 6), bytes_held.decide_memory)
    assert sound["verdict"] == "flat", sound["reason"]
    run = sound["run"]
    assert run[0]["tokens"] == 12 and run[-1]["cache_bytes"] >= run[0]["cache_bytes"] > 0
    leaking = subjects.maker(held, engine, subjects.Leak())(engine)
    assert judged(bytes_held.memory(leaking, PROMPT, 6), bytes_held.decide_memory)["verdict"] == "leaks"


@pytest.mark.parametrize("engine", ["cpu", "mlx"])
def test_a_copy_in_each_step_is_found(engine: str) -> None:
    held = subjects.weights()
    sound = bytes_held.allocation(subjects.maker(held)(engine), PROMPT, 5)
    assert judged(sound, bytes_held.decide_allocation)["verdict"] == "vectors only"
    copying = subjects.maker(held, engine, subjects.copies)(engine)
    found = judged(bytes_held.allocation(copying, PROMPT, 5), bytes_held.decide_allocation)
    assert found["verdict"] == "copies matrices"


def slow_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedding's rows, which Python looks up, take long."""
    rows = GroupedRows.rows

    def slow(self: GroupedRows, index: Any) -> Any:
        time.sleep(subjects.LONG)
        return rows(self, index)

    monkeypatch.setattr(GroupedRows, "rows", slow)


def test_a_slow_host_is_the_bottleneck_and_what_to_look_at(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = subjects.maker(subjects.weights())("cpu")
    slow_rows(monkeypatch)
    figures = time_spent.parts(decoder, PROMPT, 4, 1e9)
    assert time_spent.decide_bottleneck(figures).name == "host"
    verdict = time_spent.decide_optimisation(figures)
    assert not verdict.ok and verdict.name == "look at host" and figures["parts_over_plain"] > 0


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "arithmetic"),
        ({"of_copy": 0.9}, "memory"),
        ({"decode_busy": 0.9}, "threads"),
        ({"parts": {"host": {"seconds": 0.009, "bytes": 0}, "qkv": {"seconds": 0.001, "bytes": 1}}}, "host"),
    ],
)
def test_what_the_figures_of_a_bottleneck_say(changes: dict[str, Any], verdict: str) -> None:
    parts = {"host": {"seconds": 0.001, "bytes": 0}, "qkv": {"seconds": 0.009, "bytes": 10**6}}
    figures = {"parts": parts, "token_s": 0.01, "of_copy": 0.2, "threads": 2, "decode_busy": 1.9, "copy_bandwidth": 1e9}
    assert time_spent.decide_bottleneck(figures | changes).name == verdict


def test_a_slow_device_is_not_what_auto_should_take() -> None:
    make = subjects.maker(subjects.weights(), "cpu", subjects.sleeps)
    found = judged(devices.devices(made(["numpy", "cpu"], make), "cpu", PROMPT, 2), devices.decide_devices)
    assert found["verdict"] == "faster than auto: numpy at a prompt, numpy at a token"


def test_a_lost_thread_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread keeps one core busy at most, on a quiet machine and on a full one."""
    decoder = subjects.maker(subjects.weights())("cpu")
    monkeypatch.setattr(scaling, "cpu_threads", lambda name: 2)  # what was asked for, also where there is one core
    before = threads.get_threads()
    try:
        threads.set_threads(1)
        figures = scaling.scaling(decoder, 64, 1, tokens=2)
    finally:
        threads.set_threads(before)
    verdict = scaling.decide_scaling(figures)
    assert verdict.name == "a thread is missing" and figures["prefill_busy"] < 1.2
    assert [p["m"] for p in figures["rows"]] == [1, 2, 3, 4, 8, 16, 32, 64]
    assert [p["positions"] for p in figures["context"]] == [8, 16, 32, 48, 64]


def test_the_record_its_lines_and_its_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = measure(DecodeOptions(layers=1, prompt=6, tokens=3, repeats=1, backend="cpu"), ("memory", "bottleneck"))
    assert list(lines(record))[1:] and record["memory"]["verdict"] == "flat"
    json.dumps(record)
    flags = ["--layers", "1", "--prompt", "6", "--tokens", "3", "--repeats", "1", "--backend", "cpu", "--json"]
    picture = tmp_path / "memory.png"
    assert main(["bench", "analysis", "--only", "memory", "--plot", str(picture), *flags]) == 0
    assert json.loads(capsys.readouterr().out)["memory"]["run"]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("analysis --only speed", "--only names speed"),
        ("analysis --only bottleneck --plot a.png", "--plot draws"),
        ("decode --compare a.jsonl", "--compare goes with regression"),
    ],
)
def test_flags_that_cannot_be(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *flags.split()]) == 2
    assert message in capsys.readouterr().err


def test_what_the_first_round_opens_is_no_leak() -> None:
    for live, verdict in (((0, 10**7, 10**7, 10**7), "flat"), ((0, 10**7, 2 * 10**7, 3 * 10**7), "leaks")):
        rounds = [{"tokens": 100 * (i + 1), "live_bytes": count} for i, count in enumerate(live)]
        assert bytes_held.decide_memory({"rounds": rounds}).name == verdict


def test_what_runs_at_a_copys_speed_has_nothing_to_give_back() -> None:
    """The longest part moves its bytes as fast as a copy; the short one moves none."""
    parts = {"qkv": {"seconds": 6.0, "bytes": 6e9}, "host": {"seconds": 2.0, "bytes": 0}}
    figures = {"parts": parts, "copy_bandwidth": 1e9}
    assert time_spent.floors(figures) == {"qkv": 0.0, "host": 0.25}
    assert time_spent.decide_optimisation(figures)[:2] == (False, "look at host")
