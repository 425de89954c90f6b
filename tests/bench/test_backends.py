"""bench backends: six parts measured on the real engines; a planted fault flips each verdict.

What is sound is decided from the figures of a committed record, so that nothing here waits for a quiet machine.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bitnet_mlx.bench import delays
from bitnet_mlx.bench.comparison import speed
from bitnet_mlx.bench.comparison.measure import DECIDE, compare, lines
from bitnet_mlx.cli.main import main
from bitnet_mlx.formats.words2 import pack, unpack
from bitnet_mlx.models.weights import Linear
from bitnet_mlx.profile.html import Record
from tests.bench import subjects
from tests.bench.subjects import ENGINES, OPTIONS

RECORDS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def recorded(name: str) -> dict[str, Any]:
    return json.loads((RECORDS / name).read_text().splitlines()[-1])


def part(name: str, make: Any, held: Any, engines: list[str] = ENGINES) -> dict[str, Any]:
    vocabulary = held.config.vocab_size
    return compare(engines, "cpu", make, held.nbytes, vocabulary, OPTIONS, (name,), processes=False)[name]


@pytest.mark.parametrize("name", DECIDE)
def test_the_record_of_a_real_machine_is_sound(name: str) -> None:
    """Every verdict again from the recorded figures: what is written is what they say."""
    figures = recorded("backends.jsonl")[name]
    verdict = DECIDE[name](figures)
    assert (verdict.ok, verdict.name) == (figures["ok"], figures["verdict"])
    assert verdict.ok, verdict.reason


@pytest.mark.parametrize(
    ("name", "fault", "verdict"),
    [
        ("throughput", subjects.sleeps, "is faster than auto"),
        ("latency", subjects.stalls, "stalls"),
        ("initialisation", None, "slow start"),
        ("memory", subjects.copies, "cpu is heavy"),
    ],
)
def test_a_planted_fault_flips_the_verdict(
    name: str, fault: Any, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = subjects.weights()
    make = subjects.maker(held, "cpu", fault)
    if fault is None:  # more than a second of sleep, in making

        def make(name: str, plain: Any = make) -> Any:
            for _ in range(15):
                subjects.sleeps(0, [])
            return plain(name)

    found = part(name, make, held, ["numpy", "cpu"])
    assert not found["ok"] and verdict in found["verdict"], found["reason"]


def test_a_decoder_that_copies_its_weights_is_found() -> None:
    held = subjects.weights()
    sound = part("transfer", subjects.maker(held), held)
    assert sound["ok"] and sound["engines"]["mlx"]["in_rate"] > 0 and sound["engines"]["cpu"]["in_rate"] is None

    def copying(name: str) -> Any:
        decoder = subjects.maker(held)(name)
        kept = [np.array(linear.weight.words) for linear in held.linears.values()] * 1  # type: ignore[union-attr]
        kept.append(np.ones(2 << 20, np.uint8))
        return subjects.Faulty(decoder, lambda *_, kept=kept: None)

    assert "copies" in part("transfer", copying, held)["verdict"]


def test_a_code_turned_over_is_found() -> None:
    held = subjects.weights()
    sound = part("equality", subjects.maker(held), held)
    assert sound["ok"] and sound["engines"]["cpu"]["same_bits"]

    def turned(name: str) -> Any:
        if name != "cpu":
            return subjects.maker(held)(name)
        other = subjects.weights()
        linear = other.linears["model.layers.1.mlp.down_proj"]
        codes = unpack(linear.weight.words, linear.weight.shape[1])  # type: ignore[union-attr]
        codes[5, 7] = 1 if codes[5, 7] != 1 else -1
        weight = replace(linear.weight, words=pack(codes))  # type: ignore[type-var]
        other.linears["model.layers.1.mlp.down_proj"] = Linear(weight)
        return subjects.maker(other)(name)

    found = part("equality", turned, held)
    assert found["verdict"] == "cpu differs" and not found["engines"]["cpu"]["same_bits"]


def test_the_command_its_record_and_its_lines(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--layers", "1", "--prompt", "4", "--tokens", "2", "--repeats", "1", "--json"]
    assert main(["bench", "backends", *flags]) == 0
    record = Record(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert set(record["names"]) >= set(ENGINES)
    assert record["throughput"]["engines"]["cpu"]["of_ceiling"] > 0
    text = "\n".join(lines(record))
    assert all(f"{name}: " in text for name in DECIDE) and "of copy" in text
    assert "decode" in record._repr_html_()
    assert record["bench"] == "backends" and record["equality"]["engines"]["cpu"]["same_bits"]
    assert record["initialisation"]["engines"]["cpu"]["process_s"] > 0
    assert {"machine", "system", "packages", "commit", "command", "date"} < set(record)


def test_rates_are_of_all_sequences_and_stalls_of_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call takes two seconds here."""
    monkeypatch.setattr(speed, "Sequences", lambda *_: SimpleNamespace(prefill=lambda: 0, step=lambda: 0))
    monkeypatch.setattr(speed, "seconds", lambda _: 2.0)
    found = speed.throughput({"cpu": None}, "cpu", [1, 2, 3], 5, 2)["engines"]["cpu"]  # type: ignore[dict-item]
    assert {batch: rate["p50"] for batch, rate in found["decode"].items()} == {"1": 2.5, "4": 10.0}
    assert found["prefill"]["p50"] == 1.5
    assert speed._stalls([1.0] * 15 + [4.0, 4.1, 9.0, 1.0, 1.0]) == 0.1


def test_waiting_is_counted_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two billion nanoseconds of a thread that was there, half a billion of a new one."""
    told = iter(({"1": 5}, {"1": 2_000_000_005, "2": 500_000_000}))
    monkeypatch.setattr(delays, "_delays", lambda: next(told))
    taken = delays.take(lambda: None)
    assert taken.delayed == 2.5
    assert delays.Taken(9.0, 12.0, 2.0).undelayed(2) == 7.0 and delays.Taken(9.0, 16.0, 2.0).undelayed(2) == 8.0
