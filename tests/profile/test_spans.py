"""Spans and sums, with a clock that the test sets."""

from __future__ import annotations

import json
from dataclasses import replace

from bitnet_mlx.profile import trace
from bitnet_mlx.profile.html import Record
from bitnet_mlx.profile.spans import Recorder
from bitnet_mlx.profile.summary import Pass, Profile
from bitnet_mlx.profile.text import lines


def token(step: int, plain_ms: float, launches: int = 9) -> Pass:
    """Two layers: norm 1 ms, qkv 2 ms, attention `step` ms; head 4 ms, after a gap of the profiler's own."""
    times = iter([0, 1, 3, 3 + step, 4 + step, 6 + step, 6 + 2 * step, 100, 104])
    recorder = Recorder(lambda: next(times) * 1_000_000)
    recorder.begin()
    for layer in range(2):
        for part in ("norm", "qkv", "attention"):
            recorder.mark(part, layer)
    recorder.resume()
    recorder.mark("head")
    return Pass(1, 7, plain_ms / 1e3, tuple(recorder.spans), {"qkv": 8_000_000, "head": 2_000_000}, launches)


def profile(*plain_ms: float) -> Profile:
    steps = tuple(token(5 + i, ms) for i, ms in enumerate(plain_ms))
    return Profile("cpu", "m", 0.5, 0.01, "text", token(50, 120.0, 70), steps, True, 10e9, "jobs", {"machine": "x"})


def test_parts_sum_to_the_pass_and_gaps_are_nobodys() -> None:
    p = token(5, 20.0)
    assert p.by_part() == {"norm": 0.002, "qkv": 0.004, "attention": 0.01, "head": 0.004}
    assert abs(p.seconds - 0.02) < 1e-12


def test_medians_shares_and_bandwidth() -> None:
    made = profile(25.0, 40.0, 50.0)  # the parts take 20, 22 and 24 ms
    parts = made.parts()
    assert abs(parts["attention"].seconds - 0.012) < 1e-12 and abs(parts["attention"].share - 12 / 22) < 1e-9
    assert abs(parts["qkv"].bandwidth - 2e9) < 1 and abs(parts["qkv"].of_copy - 0.2) < 1e-9
    assert made.token_s == 0.04 and abs(made.coverage - 0.55) < 1e-9
    assert [layer["attention"] for layer in made.layers()] == [0.006, 0.006]
    record = made.record()
    decode = record["decode"]
    assert decode["bytes"] == 10_000_000 and decode["launches"] == 9 and record["machine"] == "x"
    assert (
        decode["bandwidth"] == 10_000_000 / 0.04
        and decode["of_copy"] == 0.025
        and decode["plain_s"] == [0.025, 0.04, 0.05]
    )
    assert abs(decode["parts_sum_s"] - 0.022) < 1e-12 and abs(decode["parts_over_plain"] - 0.55) < 1e-9
    assert record["prefill"]["launches"] == 70 and record["prefill"]["plain_s"] == 0.12
    json.dumps(record)
    uneven = replace(made, decode=(token(5, 25.0), token(6, 40.0), token(30, 500.0)))
    assert uneven.token_s == 0.04 and abs(uneven.coverage - 0.55) < 1e-9, "medians, not means"
    assert abs(uneven.parts()["attention"].seconds - 0.012) < 1e-12
    text = "\n".join(lines(made))
    assert "a token 40.000 ms" in text and "first token 10.0 ms (1 tokens of prompt)" in text
    assert "qkv            4.000   18.2%      8.00    2.00      20%" in text
    assert "22.000     55% of the plain run; 10.00 MB a token at 0.25 GB/s, 2% of a copy's 10.0 GB/s" in text


def test_the_longest_layer_is_named() -> None:
    made = profile(20.0)
    spans = tuple(span._replace(end=span.end + 10**6 * (span.layer == 1)) for span in made.decode[0].spans)
    slow = replace(made, decode=(replace(made.decode[0], spans=spans),))
    assert "layers: 2, 8.000 to 11.000 ms each, the longest is layer 1" in "\n".join(lines(slow))


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
    times = {e["name"]: e["dur"] for e in found if e["ph"] == "X" and e["name"] in ("norm", "qkv", "head")}
    assert times == {"norm": 1000, "qkv": 2000, "head": 4000}, "microseconds"
    assert whole[1]["args"] == {"tokens": 1, "positions": 7, "plain_ms": 20.0, "launches": 9}


def test_a_notebook_shows_tables_and_escapes() -> None:
    assert "<td" in profile(20.0)._repr_html_() and "attention" in profile(20.0)._repr_html_()
    shown = Record(bench="x", nested={"a<b": 1.5, "none": None}, samples=list(range(9)))._repr_html_()
    assert "nested.a&lt;b" in shown and "1.5" in shown and "samples" not in shown and "none" not in shown
