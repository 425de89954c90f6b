"""Spans and sums, with a clock that the test sets."""

from __future__ import annotations

import json

from bitnet_mlx.profile import trace
from bitnet_mlx.profile.html import Record
from bitnet_mlx.profile.spans import Recorder
from bitnet_mlx.profile.summary import Pass, Profile
from bitnet_mlx.profile.text import lines


def token(step: int, plain_ms: float) -> Pass:
    """Two layers: norm 1 ms, qkv 2 ms, attention `step` ms; head 4 ms, after a gap of the profiler's own."""
    times = iter([0, 1, 3, 3 + step, 4 + step, 6 + step, 6 + 2 * step, 100, 104])
    recorder = Recorder(lambda: next(times) * 1_000_000)
    recorder.begin()
    for layer in range(2):
        for part in ("norm", "qkv", "attention"):
            recorder.mark(part, layer)
    recorder.resume()
    recorder.mark("head")
    return Pass(1, 7, plain_ms / 1e3, tuple(recorder.spans), {"qkv": 8_000_000, "head": 2_000_000}, 9)


def profile(*plain_ms: float) -> Profile:
    steps = tuple(token(5 + i, ms) for i, ms in enumerate(plain_ms))
    return Profile("cpu", "m", 0.5, 0.01, "text", token(50, 120.0), steps, True, 10e9, "jobs", {"machine": "x"})


def test_parts_sum_to_the_pass_and_gaps_are_nobodys() -> None:
    p = token(5, 20.0)
    assert p.by_part() == {"norm": 0.002, "qkv": 0.004, "attention": 0.01, "head": 0.004}
    assert abs(p.seconds - 0.02) < 1e-12


def test_medians_shares_and_bandwidth() -> None:
    made = profile(20.0, 22.0, 24.0)
    parts = made.parts()
    assert abs(parts["attention"].seconds - 0.012) < 1e-12 and abs(parts["attention"].share - 12 / 22) < 1e-9
    assert abs(parts["qkv"].bandwidth - 2e9) < 1 and abs(parts["qkv"].of_copy - 0.2) < 1e-9
    assert made.token_s == 0.022 and abs(made.coverage - 1) < 1e-9
    assert [layer["attention"] for layer in made.layers()] == [0.006, 0.006]
    record = made.record()
    assert record["decode"]["bytes"] == 10_000_000 and record["decode"]["launches"] == 9 and record["machine"] == "x"
    json.dumps(record)


def test_the_toll_of_a_mark_is_taken_off_and_never_more_than_there_was() -> None:
    times = iter([0, 10, 12])
    recorder = Recorder(lambda: next(times))
    recorder.begin()
    recorder.toll = 4
    recorder.mark("o", 0)
    recorder.mark("down", 0)
    assert [span.end - span.start for span in recorder.spans] == [6, 0]


def test_one_token_has_no_decode_and_the_prompt_stands_for_it() -> None:
    made = profile()
    assert made.record()["decode"]["tokens"] == 0 and made.token_s == 0.12
    assert any("sum" in line for line in lines(made))


def test_the_trace_nests_parts_in_passes() -> None:
    made = profile(20.0, 22.0)
    found = trace.events(made)
    whole = [e for e in found if e["ph"] == "X" and "launches" in e["args"]]
    assert [e["name"] for e in whole] == ["prefill", "token 2", "token 3"]
    assert sum(e["ph"] == "X" for e in found) == 3 + 3 * 7
    assert all(e["dur"] >= 0 for e in found if e["ph"] == "X")


def test_a_notebook_shows_tables_and_escapes() -> None:
    assert "<td" in profile(20.0)._repr_html_() and "attention" in profile(20.0)._repr_html_()
    shown = Record(bench="x", nested={"a<b": 1.5, "none": None}, samples=list(range(9)))._repr_html_()
    assert "nested.a&lt;b" in shown and "1.5" in shown and "samples" not in shown and "none" not in shown
