"""bench regression: the decision on recorded samples of a real machine, and the command from end to end.

tests/bench/data/same_code.jsonl holds the suite's metrics of one commit, measured 21 times in as many processes on a busy
machine of two cores.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitnet_mlx.bench import regression
from bitnet_mlx.bench.decode import DecodeOptions
from bitnet_mlx.bench.delays import Taken
from bitnet_mlx.bench.regression import Suite, compare, summary
from bitnet_mlx.bench.stamp import append
from bitnet_mlx.cli.main import main
from bitnet_mlx.models.decoder_cpu import CpuDecoder
from tests.support.random_model import random_weights, tiny_config

RUNS = [json.loads(line) for line in (Path(__file__).parent / "data" / "same_code.jsonl").read_text().splitlines()]
FLAGS = ["--layers", "1", "--prompt", "4", "--tokens", "2", "--backend", "cpu"]


def metrics(run: dict[str, Any], factor: float = 1.0) -> dict[str, Any]:
    """A run's record; factor: how much slower the code was."""
    slowed = {
        name: {kind: [factor * s for s in kinds[kind]] for kind in kinds} for name, kinds in run["samples"].items()
    }
    return {"metrics": {name: summary(kinds) for name, kinds in slowed.items()}}


def taken(runs: Sequence[dict[str, Any]], factor: float = 1.0) -> Any:
    """Measures anew: the next recorded run, a little slower than it was."""
    following = iter(runs)

    def again() -> Any:
        samples = next(following)["samples"]
        return {n: {k: [factor * s for s in kinds[k]] for k in kinds} for n, kinds in samples.items()}

    return again


def test_the_same_code_twenty_times_gives_no_alarm() -> None:
    """Whichever run is the baseline: 21 times 20 comparisons, with the next runs as the repetitions."""
    assert len(RUNS) == 21
    alarms = 0
    for i, baseline in enumerate(RUNS):
        others = RUNS[i + 1 :] + RUNS[:i]
        for at, run in enumerate(others):
            rest = others[at + 1 :] + others[:at]
            alarms += bool(compare(metrics(run), metrics(baseline), taken(rest))["regressed"])
    assert alarms == 0


def test_much_slower_code_gives_an_alarm_on_a_busy_machine() -> None:
    """The same recorded runs, five times slower, against each of them; what is twice as slow may hide in its moods."""
    for i, baseline in enumerate(RUNS):
        others = RUNS[i + 1 :] + RUNS[:i]
        assert compare(metrics(others[0], 5.0), metrics(baseline), taken(others[1:], 5.0))["regressed"]


def test_slightly_slower_code_gives_an_alarm_where_runs_agree() -> None:
    """The last three runs met the machine in one mood."""
    baseline, now, again = RUNS[-3:]
    found = compare(metrics(now, 1.3), metrics(baseline), taken([again, now] * 2, 1.3))
    assert found["regressed"] and not compare(metrics(now), metrics(baseline), taken([again] * 4))["regressed"]


def run(median: float, width: float, reference: float = 1.0) -> dict[str, Any]:
    samples = np.linspace(median * (1 - width), median * (1 + width), 15).tolist()
    kinds = {"seconds": samples, "references": [s / reference for s in samples]}
    return {"metrics": {"decode": summary(kinds)}}


@pytest.mark.parametrize(
    ("now", "regressed"),
    [
        (run(1.04, 0.001), False),  # apart, but not by 5 %
        (run(1.06, 0.001), True),
        (run(1.06, 0.1), False),  # by 6 %, but not apart
        (run(2.0, 0.001, reference=2.0), False),  # the whole machine is slower
        (run(0.5, 0.001), False),
    ],
)
def test_five_percent_and_bands_apart_in_seconds_and_in_references(now: dict[str, Any], regressed: bool) -> None:
    again = {"decode": {k: now["metrics"]["decode"][k]["samples"] for k in ("seconds", "references")}}
    found = compare(now, run(1.0, 0.001), lambda: again)
    assert found["regressed"] == (["decode"] if regressed else [])


def test_what_shows_once_only_is_no_regression() -> None:
    calm = {"decode": {k: run(1.0, 0.001)["metrics"]["decode"][k]["samples"] for k in ("seconds", "references")}}
    assert compare(run(2.0, 0.001), run(1.0, 0.001), lambda: calm)["regressed"] == []


def test_a_slow_kernel_exits_1_and_the_same_code_0(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiled step waits for twenty times as long as a token of the baseline took at its slowest."""
    monkeypatch.setattr(regression, "SAMPLES", 5)
    baseline = str(tmp_path / "baseline.jsonl")
    assert main(["bench", "regression", *FLAGS, "--record", baseline, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    slowest = max(max(kinds["seconds"]["samples"]) for kinds in record["metrics"].values())
    rows = CpuDecoder._rows

    def slow(*arguments: Any) -> Any:
        time.sleep(20 * slowest)
        return rows(*arguments)

    monkeypatch.setattr(CpuDecoder, "_rows", slow)
    assert main(["bench", "regression", *FLAGS, "--compare", baseline]) == 1
    shown = capsys.readouterr().out
    assert "REGRESSED: " in shown and "of the baseline" in shown


WORK = (
    "bench", "backend", "preset", "model", "layers", "head_bits", "dtype", "prompt", "tokens", "machine", "processor", "cores",
    "threads", "device_name",
)  # fmt: skip


def test_the_last_record_of_the_same_work_is_the_baseline(tmp_path: Path) -> None:
    """A record of other work, or of another machine, is none, and what differs is told."""
    record = {**dict.fromkeys(WORK, 1), "metrics": {}}
    path = tmp_path / "records.jsonl"
    for number in (1, 2):
        append({**record, "number": number}, path)
    append({**record, "bench": "decode", "number": 3}, path)
    assert regression.find_baseline(path, record)["number"] == 2
    for name in WORK[1:]:
        with pytest.raises(regression.NoBaselineError, match=f"3 records .*differs in {name} 1 there, 9 here"):
            regression.find_baseline(path, {**record, name: 9})


def test_seconds_are_of_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    suite = Suite(CpuDecoder(random_weights(tiny_config())), DecodeOptions(prompt=4, tokens=2))
    monkeypatch.setattr(regression, "take", lambda call: Taken(6.0, 3.0, 2.0))
    monkeypatch.setattr(Suite, "_reference", lambda self: 0.5)
    monkeypatch.setattr(regression, "SAMPLES", 1)
    found = suite.samples()
    assert set(found) == {"prefill", "decode", "decode of 4"}
    assert found["prefill"] == {"seconds": [6.0], "references": [12.0], "undelayed": [4.0]}
    assert found["decode"] == found["decode of 4"] == {"seconds": [3.0], "references": [6.0], "undelayed": [2.0]}


def test_nothing_to_compare_with_exits_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regression, "SAMPLES", 2)
    baseline = tmp_path / "baseline.jsonl"
    assert main(["bench", "regression", *FLAGS, "--compare", str(baseline)]) == 2
    assert "no baseline in" in capsys.readouterr().err
    baseline.write_text("not json")
    assert main(["bench", "regression", *FLAGS, "--compare", str(baseline)]) == 2
    capsys.readouterr()
    baseline.write_text("")
    assert main(["bench", "regression", *FLAGS, "--record", str(baseline)]) == 0
    other = json.loads(baseline.read_text()) | {"processor": "another"}
    baseline.write_text(json.dumps(other) + "\n")
    assert main(["bench", "regression", *FLAGS, "--compare", str(baseline)]) == 2
    assert "processor 'another' there" in capsys.readouterr().err
