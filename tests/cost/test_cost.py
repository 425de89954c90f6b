"""The mat-vecs' modelled cost: ours must not grow, others' are what the design says, one operation more is one more."""

import json

import pytest

from benchmarks.cost import report, subjects
from benchmarks.cost.__main__ import main
from benchmarks.cost.ir import UnknownTextError
from bitnet_mlx.backends.kernels.chips import CHIPS
from tests.emulator.compiler import why_not


@pytest.fixture(autouse=True)
def compiler():
    if reason := why_not():
        pytest.skip(reason)


# Cycles a weight that each of our inner loops may cost.
LIMITS = [
    (subjects.words2(1), 2.45),
    (subjects.words2(2), 2.1),
    (subjects.words2(4), 2.0),
    (subjects.words2(8), 1.85),
    (subjects.words2(4, words=2), 1.85),
    (subjects.words2(4, m=8), 9.0),
    (subjects.trits5(4), 2.9),
    (subjects.trits5(4, m=8), 9.9),
    (subjects.float16(4, "float16"), 2.9),
    (subjects.float16(4, "bfloat16"), 3.1),
]


@pytest.mark.parametrize(("subject", "limit"), LIMITS, ids=[f"{s.name} M={s.m}" for s, _ in LIMITS])
def test_ours_does_not_grow(subject, limit):
    cost = report.measure(subject)
    assert cost.cycles <= limit
    assert cost.loop["fma"] >= subject.weights * subject.m
    assert cost.loop["int-float conversion"] == cost.loop["integer multiply"] == 0


def test_stock_and_mlx_lm_are_what_the_design_says():
    for subject in subjects.stock():
        cost = report.measure(subject)
        assert cost.cycles == pytest.approx(6.9, rel=0.05)
        assert cost.loop["int-float conversion"] == subject.weights
    cost = report.measure(subjects.mlx_lm())
    assert cost.cycles == pytest.approx(10.1, rel=0.05)
    assert cost.loop["int-float conversion"] == 16


TRITS_LOAD, WORDS_LOAD = "const uint u = row[r][i]", "u[r] = wp[at[r]]"
PLANTED = [
    (subjects.trits5(1), TRITS_LOAD, f"{TRITS_LOAD} ^ rows", "bitwise", 1),
    (subjects.trits5(1), TRITS_LOAD, f"{TRITS_LOAD} + rows", "integer add", 1),
    (subjects.trits5(1), TRITS_LOAD, f"{TRITS_LOAD} * rows", "integer multiply", 4),
    (subjects.words2(1), WORDS_LOAD, f"{WORDS_LOAD} ^ stride", "bitwise", 1),
    (subjects.words2(4), WORDS_LOAD, f"{WORDS_LOAD} ^ (r ? 0 : stride)", "bitwise", 1),
]


@pytest.mark.parametrize(("subject", "place", "instead", "kind", "cycles"), PLANTED)
def test_a_planted_operation_counts_once_a_pass(subject, place, instead, kind, cycles):
    text = subject.text()
    assert place in text.metal
    before = report.measure_text(subject, text).loop
    after = report.measure_text(subject, text.edited(lambda metal: metal.replace(place, instead))).loop
    assert after[kind] == before[kind] + 1
    assert {k: n for k, n in after.items() if k != kind} == {k: n for k, n in before.items() if k != kind}
    assert after.cycles == before.cycles + cycles


def test_an_array_in_memory_is_refused():
    subject = subjects.trits5(1)
    text = subject.text().edited(lambda metal: metal.replace("c[r][2 * j]", "c[r][(2 * j + i) % 10]"))
    with pytest.raises(UnknownTextError, match="kept in memory"):
        report.measure_text(subject, text)


def test_a_loop_that_is_not_the_expected_one_is_refused():
    text = subjects.trits5(1).text()
    with pytest.raises(UnknownTextError, match="20 float products; 40 were expected"):
        report.measure_text(subjects.trits5(2), text)


def test_predictions():
    """At R = 4 ours waits for memory on every chip; the conversions of the others bound them on most."""
    ours, lm = report.measure(subjects.words2(4)), report.measure(subjects.mlx_lm())
    [half, _] = (report.measure(subject) for subject in subjects.stock())
    for chip in CHIPS:
        assert ours.on(chip).bound == "memory" and ours.on(chip).share == 1
        assert lm.on(chip).bound == "arithmetic"
        assert half.on(chip).share < 1
        assert ours.on(chip).speed == pytest.approx(chip.bandwidth * 4)
    pro = next(chip for chip in CHIPS if chip.name == "Apple M1 Pro" and chip.cores == 16)
    assert half.on(pro).share == pytest.approx(0.5, abs=0.05)


def test_command(capsys):
    main(["--only", "trits5 R=4"])
    text = capsys.readouterr().out
    assert text.count("a model, not a measurement") == 2 and "Apple M5 Max" in text
    main(["--only", "trits5 R=4", "--json"])
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["rows_of_activations"] for r in records] == [1, 2, 4, 8]
    assert all(r["what"] == "a model, not a measurement" and len(r["chips"]) == len(CHIPS) for r in records)
    assert records[0]["memory_bytes_per_weight"] == 0.2
