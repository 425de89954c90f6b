"""How many tokens are guessed, and when no more are: from times that the test gives, and from a decoder's own."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bitnet_mlx.backends import cache_root
from bitnet_mlx.generation import row_times as module
from bitnet_mlx.generation.draft_length import MOST, DraftLength, Verification
from bitnet_mlx.generation.row_times import ROWS, RowTimes, measure, row_times
from bitnet_mlx.models.decoder_numpy import NumpyDecoder
from tests.support.random_model import random_weights, tiny_config

FLAT = {rows: 1.0 + 0.01 * rows for rows in ROWS}  # memory-bound: rows cost next to nothing
STEEP = {rows: float(rows) for rows in ROWS}  # compute-bound: a row costs a row


def played(
    times: dict[int, float], right: float, guess_s: float = 0.0, steps: int = 400, fixed: int | None = None
) -> tuple[DraftLength, list[int], float, int]:
    """(the chooser, lengths chosen, seconds, tokens) after so many steps of a machine with these times, where a guess is
    right with a fixed probability.
    """
    random, table = np.random.default_rng(5), RowTimes(times)
    length = DraftLength(table, fixed)
    chosen, seconds, tokens = [], 0.0, 0
    for _ in range(steps):
        count = length.choose("only", 100)
        chosen.append(count)
        step_s = table.ratio(count + 1) * table.one
        accepted = int(np.argmin(np.append(random.random(count) < right, False)))
        if count:
            length.verified(Verification("only", count, accepted, step_s, guess_s * count))
        else:
            length.plain(step_s)
        seconds += step_s + guess_s * count
        tokens += accepted + 1
    return length, chosen, seconds, tokens


def test_the_line_between_and_behind_what_was_measured() -> None:
    times = RowTimes({1: 2.0, 2: 3.0, 4: 6.0})
    assert [times.ratio(rows) for rows in (1, 2, 3, 4, 6)] == [1, 1.5, 2.25, 3, 4.5]
    assert RowTimes({1: 2.0, 2: 1.0}).ratio(2) == 1, "more rows are never taken for less work"


def test_long_where_rows_are_cheap_and_guesses_right() -> None:
    length, chosen, seconds, tokens = played(FLAT, 0.98)
    assert length.off is None and np.median(chosen) == MOST
    assert tokens / seconds > 5 / FLAT[1]
    length, chosen, seconds, tokens = played(FLAT, 0.5)
    assert length.off is None and 2 <= np.median(chosen) < 8
    assert length.gain is not None and 1.5 < length.gain < 2.2


@pytest.mark.parametrize(("times", "right", "guess_s"), [(STEEP, 0.9, 0.0), (FLAT, 0.02, 0.0), (FLAT, 0.7, 2.0)])
def test_off_where_it_loses(times: dict[int, float], right: float, guess_s: float) -> None:
    """Rows that cost as much as steps; guesses that are wrong; a draft model as slow as the model: little time is lost."""
    length, chosen, seconds, tokens = played(times, right, guess_s)
    assert length.off and not any(chosen[-200:])
    assert tokens / seconds > 0.75 / times[1]


def test_a_first_measurement_that_was_wrong_is_found_out() -> None:
    """It promised cheap rows; on the machine as it is now they cost what steps cost."""
    length, now = DraftLength(RowTimes(FLAT)), RowTimes(STEEP)
    for _ in range(200):
        count = length.choose("only", 100)
        if count:
            length.verified(Verification("only", count, count * 6 // 10, now.ratio(count + 1), 0.0))
        else:
            length.plain(1.0)
    assert length.off and (
        "times the speed" in length.off or "no number" in length.off or "as many steps" in length.off
    )


def test_a_busy_moment_when_it_was_measured_is_found_out() -> None:
    """Few rows seemed dear; those of more rows, of late, were not."""
    length = DraftLength(RowTimes({1: 1.0, 2: 2.5, 3: 3.5, 4: 4.5, 16: 17.0}), free=True)
    for _ in range(6):
        length.plain(1.0)
        length.verified(Verification("only", 5, 5, 1.5, 0.0))
    assert length.choose("only", 2) == 2 and length.choose("only", 100) == 5


def test_free_guesses_wait_for_better_times() -> None:
    """Where they are free a refusal is no end: what would have been right is counted, and guessing begins again."""
    length = DraftLength(RowTimes({1: 1.0, 2: 1.7, 16: 9.0}), free=True)
    for turn in range(100):
        length.learn("only", 0, wrong=True)
        assert length.choose("only", 100) == 0 or turn < 8
        length.plain(1.0)
    assert length.off is None
    for _ in range(60):
        length.learn("only", 1, wrong=False)
    assert length.choose("only", 100) >= 3


def test_a_pause_of_the_machine_is_no_loss() -> None:
    length = DraftLength(RowTimes(FLAT))
    for i in range(40):
        length.plain(1.0)
        length.verified(Verification("only", 3, 2, 200.0 if i == 15 else 1.04, 0.0))
    assert length.off is None


def test_a_fixed_number_is_kept() -> None:
    length, chosen, *_ = played(STEEP, 0.1, fixed=4)
    assert set(chosen) == {4} and length.off is None
    assert length.choose("only", 2) == 2 and length.choose("only", 0) == 0


def test_kinds_are_judged_apart() -> None:
    length = DraftLength(RowTimes(FLAT))
    for _ in range(10):
        length.verified(Verification("good", 4, 4, 1.05, 0.0))
        length.verified(Verification("bad", 4, 0, 1.05, 0.0))
        length.plain(1.0)
    assert length.choose("good", 100) > 10 > 3 > length.choose("bad", 100)


def test_times_are_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache_root.VARIABLE, str(tmp_path))
    decoder = NumpyDecoder(random_weights(tiny_config(num_hidden_layers=1)))
    times = row_times(decoder)
    assert times.rows[:2] == [1, 2] and all(s > 0 for s in times.seconds)
    monkeypatch.setattr(module, "measure", lambda decoder: pytest.fail("measured again"))
    assert row_times(decoder).seconds == times.seconds
    monkeypatch.setattr(module, "measure", measure)
    (file,) = (tmp_path / "rows").iterdir()
    sound = file.read_text()
    for damaged in ("", "{}", sound[:-20], json.dumps({**json.loads(sound), "seconds": {"1": 1.0, "2": -1}})):
        file.write_text(damaged)
        assert row_times(decoder).rows[:2] == [1, 2]
        assert json.loads(file.read_text())["about"] == json.loads(sound)["about"], "written anew"
    other = NumpyDecoder(random_weights(tiny_config(num_hidden_layers=2)))
    row_times(other)
    assert len(list((tmp_path / "rows").iterdir())) == 2


class Slow(NumpyDecoder):
    """A row takes a row's time, by a clock that only it moves."""

    now = 0.0
    fed: list[int]

    def step(self, tokens: Any, caches: Any, logits: Any = "last") -> list[np.ndarray]:
        Slow.now += len(tokens[0]) * 0.1
        self.fed.append(len(tokens[0]))
        return super().step(tokens, caches, logits)


def test_where_a_row_costs_a_row_little_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Slow(random_weights(tiny_config(num_hidden_layers=1)))
    decoder.fed = []
    monkeypatch.setattr(module.time, "perf_counter", lambda: Slow.now)
    assert measure(decoder) == pytest.approx({1: 0.1, 2: 0.2})
    assert decoder.fed[1:] == [1, 2, 1, 2]


def test_a_short_context_is_no_error() -> None:
    measured = measure(NumpyDecoder(random_weights(tiny_config(num_hidden_layers=1, max_position_embeddings=10))))
    assert {1, 2} <= set(measured) and max(measured) < 10


def test_nowhere_to_keep_them_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache_root.VARIABLE, str(tmp_path / "file"))
    assert row_times(NumpyDecoder(random_weights(tiny_config(num_hidden_layers=1)))).one > 0


def test_a_gain_needs_four_plain_steps_to_be_told() -> None:
    """Two tokens in half a second against one in a second."""
    length = DraftLength(None, fixed=2)
    length.verified(Verification("a", 2, 1, 0.4, 0.1))
    for _ in range(3):
        length.plain(1.0)
        assert length.gain is None
    length.plain(1.0)
    assert length.gain == 4.0


def test_the_least_of_several_rounds_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that pauses in every round but one, in another for each number of rows."""
    now, seen = [0.0], Counter()

    class Slow:
        config = SimpleNamespace(max_position_embeddings=99)

        def make_cache(self, *_: Any, **__: Any) -> Any:
            return SimpleNamespace(trim=lambda _: None)

        def step(self, tokens: list[list[int]], *_: Any, **__: Any) -> None:
            rows = len(tokens[0])
            seen[rows] += 1
            now[0] += 0.001 * rows * (1 if seen[rows] == 2 + rows % 2 else 7)

    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    assert measure(Slow()) == {rows: pytest.approx(0.001 * rows) for rows in ROWS}  # type: ignore[arg-type]


def test_six_losses_in_a_row_end_it_and_a_gain_between_does_not() -> None:
    length = DraftLength(RowTimes(FLAT), None, free=True)
    for _ in range(4):
        length.plain(1.0)
    for seconds in (*[1.01] * 16, 0.5, *[2.0] * 5):  # the last 12 to 32 are judged: five losses, a gain, five losses
        length.verified(Verification("a", 1, 0, seconds, 0.0))
        assert length.off is None
    length.verified(Verification("a", 1, 0, 2.0, 0.0))
    assert length.off == "0 of the last 23 guesses were right, 0.80 times the speed without them"
