"""Scopes, owners, peaks and the timeline of a tracker, on real memory."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading

import mlx.core as mx
import numpy as np
import pytest

from bitnet_mlx.errors import BackendError, ConfigError
from bitnet_mlx.memory import MemoryTracker, clear_cache, current, mlx_counters, set_limits
from bitnet_mlx.memory.records import Reading, Sample
from bitnet_mlx.memory.timeline import Timeline

MB = 1 << 20


class Block:
    """Touched memory."""

    def __init__(self, nbytes: int) -> None:
        self.values = np.ones(nbytes, np.uint8)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes


def test_scopes_nest_and_tell_what_stayed() -> None:
    tracker = MemoryTracker()
    with tracker.scope("outer"):
        with tracker.scope("inner") as inner:
            block = Block(32 * MB)
            tracker.own(block, "weights", keep=True)
        with tracker.scope("nothing") as nothing:
            pass
    assert [scope.name for scope in tracker.scopes] == ["outer/inner", "outer/nothing", "outer"]
    assert inner.grew == pytest.approx(32 * MB, abs=2 * MB)
    assert abs(nothing.grew or 0) < 2 * MB
    assert inner.owners["weights"] == block.nbytes
    assert inner.seconds >= 0


def test_a_peak_between_samples_is_seen() -> None:
    """A block that is gone before the scope ends; a new high of the process is exact."""
    tracker = MemoryTracker()
    high = Block(max((mlx_peak_room()), MB))
    with tracker.scope("burst") as burst:
        before = tracker.read().used
        Block(160 * MB)
    assert burst.peak_used >= before + 150 * MB
    assert tracker.peak_used >= burst.peak_used
    assert (burst.grew or 0) < 80 * MB
    del high


def mlx_peak_room() -> int:
    """Bytes that bring this process to its highest resident set so far."""
    tracker = MemoryTracker()
    from bitnet_mlx.memory.system import peak_resident_bytes, resident_bytes

    del tracker
    return (peak_resident_bytes() or 0) - (resident_bytes() or 0)


def test_mlx_is_counted_exactly() -> None:
    clear_cache()
    with MemoryTracker() as tracker:
        start = tracker.read().mlx_active or 0
        with tracker.scope("arrays"):
            weights = mx.ones((1024, 1024))
            mx.eval(weights)
            tracker.own(weights, "weights", on_mlx=True, keep=True)
            with tracker.scope("peak"):
                passing = mx.ones((2048, 1024))
                mx.eval(passing)
                del passing
        peak, arrays = tracker.scopes
        near = pytest.approx(start + 12 * MB, abs=64)  # a scalar lies beside each array of ones
        assert peak.name == "arrays/peak"
        assert peak.mlx_peak == near
        assert arrays.mlx_peak == near
        reading = tracker.read()
        assert reading.mlx_active == pytest.approx(start + 4 * MB, abs=64)
        assert (reading.mlx_cache or 0) >= 8 * MB
        other = mx.ones((512, 1024))
        mx.eval(other)
        assert tracker.owners()["activations"] == pytest.approx(
            start + 2 * MB, abs=64
        )  # MLX's arrays that nobody registered
        assert tracker.owners()["weights"] == 4 * MB
        assert clear_cache() >= 8 * MB
    assert tracker.peak_mlx == near


def test_owners_sum_to_the_process() -> None:
    tracker = MemoryTracker()
    block = Block(16 * MB)
    tracker.own(block, lambda held: {"weights": held.nbytes // 4, "head": 3 * held.nbytes // 4})
    tracker.own(block, "kv_cache", "again", nbytes=5)
    tracker.own(block, "kv_cache", "again", nbytes=5)  # the same thing under the same name counts once
    reading = tracker.read()
    owners = tracker.owners(reading)
    assert (owners["weights"], owners["head"], owners["kv_cache"]) == (4 * MB, 12 * MB, 5)
    assert sum(owners.values()) == reading.used


def test_what_lies_outside_mlx_takes_nothing_from_its_activations() -> None:
    tracker = MemoryTracker()
    weights, hidden, block = mx.ones((256, 1024)), mx.ones((512, 1024)), Block(8 * MB)
    mx.eval(weights, hidden)
    tracker.own(block, "weights")
    tracker.own(weights, "head", on_mlx=True)
    reading = tracker.read()
    assert tracker.owners(reading)["activations"] == (reading.mlx_active or 0) - weights.nbytes >= hidden.nbytes


def test_what_is_gone_is_not_held_on_to() -> None:
    tracker = MemoryTracker()
    for _ in range(100):
        tracker.own(Block(1), "kv_cache")
    assert len(tracker._holdings._held) <= 1


def test_what_a_process_uses_is_the_largest_of_its_counters() -> None:
    assert Reading(0, mlx_active=5, mlx_cache=4, rss=8).used == 9
    assert Reading(0, mlx_active=5, mlx_cache=4, rss=8, footprint=20).used == 20
    assert Reading(0, rss=8).used == 8


def test_a_cache_that_grows_is_followed() -> None:
    tracker = MemoryTracker()
    block = Block(MB)
    tracker.own(block, "kv_cache")
    with tracker.scope("decode") as record:
        block.values = np.ones(4 * MB, np.uint8)
        tracker.sample()
        block.values = np.ones(2 * MB, np.uint8)
    assert record.owner_peaks["kv_cache"] == 4 * MB
    assert record.owners["kv_cache"] == 2 * MB


def test_threads_have_scopes_of_their_own() -> None:
    tracker = MemoryTracker()
    inside, go_on = threading.Event(), threading.Event()

    def work() -> None:
        with tracker.scope("worker"):
            inside.set()
            go_on.wait(10)

    thread = threading.Thread(target=work, name="second")
    with tracker.scope("main"):
        thread.start()
        inside.wait(10)
        assert tracker.sample().scope == "main"
        with tracker.scope("part"):
            go_on.set()
            thread.join()
    assert {(s.name, s.thread) for s in tracker.scopes} == {
        ("worker", "second"), ("main/part", threading.current_thread().name), ("main", threading.current_thread().name)
    }  # fmt: skip


def test_a_scope_may_end_in_another_thread() -> None:
    """As that of a generator which the collector closes."""
    tracker = MemoryTracker()
    opened = tracker.scope("stream")
    opened.__enter__()
    thread = threading.Thread(target=opened.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    assert [scope.name for scope in tracker.scopes] == ["stream"]
    with tracker.scope("after") as record:
        pass
    assert record.name == "after"


def test_many_threads_at_once() -> None:
    tracker = MemoryTracker(interval_s=0)
    failed: list[Exception] = []

    def work(number: int) -> None:
        try:
            for _ in range(20):
                with tracker.scope(f"t{number}"):
                    block = Block(1000)
                    tracker.own(block, "kv_cache")
                    tracker.tick()
                    tracker.snapshot()
        except Exception as error:  # noqa: BLE001, told below
            failed.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert len(tracker.scopes) == 80
    assert tracker.leaks() == []


def test_the_current_tracker() -> None:
    assert current() is None
    with MemoryTracker() as outer:
        assert current() is outer
        with MemoryTracker() as inner:
            assert current() is inner
        assert current() is outer
    assert current() is None


def test_a_tick_samples_when_the_interval_has_passed() -> None:
    times = iter([0.0, *[t / 10 for t in range(1, 200) for _ in range(2)]])
    tracker = MemoryTracker(interval_s=0.5, clock=times.__next__)
    for _ in range(30):
        tracker.tick()
    steps = [b.time_s - a.time_s for a, b in itertools.pairwise(tracker.timeline)]
    assert steps
    assert min(steps) >= 0.5


@pytest.mark.parametrize("capacity", [7, 8])
def test_a_full_timeline_thins_out_evenly(capacity: int) -> None:
    timeline = Timeline(1.0, capacity)
    for second in range(100):
        if timeline.due(float(second)):
            timeline.add(Sample(float(second), second, None, {}, ""))
            assert timeline.samples[-1].time_s == second, "the newest stays"
    times = [sample.time_s for sample in timeline.samples]
    assert len(times) <= capacity
    assert timeline.interval_s == 16.0
    assert times == sorted(times)
    assert max(b - a for a, b in itertools.pairwise(times)) <= 2 * timeline.interval_s


def test_limits_are_told_once_set() -> None:
    before = mx.get_memory_limit()
    try:
        assert set_limits(memory=1 << 33, cache=1 << 28).cache == 1 << 28
        found = mlx_counters.limits()
        assert (found.memory, found.cache, found.wired) == (1 << 33, 1 << 28, None)
    finally:
        mx.set_memory_limit(before)
        mx.set_cache_limit(before)
    with pytest.raises(ConfigError, match="cache limit is -1"):
        set_limits(cache=-1)


def test_a_wired_limit_is_remembered_beside_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "set_wired_limit", lambda _: 0)
    monkeypatch.setattr(mlx_counters, "_set", mlx_counters.Limits())
    before = mx.set_cache_limit(1 << 28)
    try:
        set_limits(wired=5)
        found = set_limits(cache=1 << 27)
        assert (found.cache, found.wired) == (1 << 27, 5)
    finally:
        mx.set_cache_limit(before)


def test_a_peak_is_never_below_what_is_active() -> None:
    held = mx.ones((1024, 1024))
    mx.eval(held)
    mx.reset_peak_memory()
    found = mlx_counters.counters()
    assert found is not None and found.peak >= found.active >= held.nbytes


def test_a_wired_limit_that_mlx_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> int:
        raise ValueError("larger than the maximum working set size")

    monkeypatch.setattr(mx, "set_wired_limit", refuse)
    with pytest.raises(BackendError, match="refuses a wired limit"):
        set_limits(wired=1)


def test_what_cannot_be_registered() -> None:
    tracker = MemoryTracker()
    with pytest.raises(ConfigError, match="owner 'heads'"):
        tracker.own(Block(1), "heads")
    with pytest.raises(ConfigError, match="has no nbytes"):
        tracker.own(threading.Event(), "head")


def test_record_and_tables() -> None:
    with MemoryTracker(1 << 40) as tracker, tracker.scope("<load>"):
        pass
    record = json.loads(json.dumps(tracker.record()))
    assert record["scopes"][0]["name"] == "<load>"
    assert record["snapshot"]["used"] > MB
    assert record["snapshot"]["reading"]["footprint"] is None or sys.platform == "darwin"
    assert "resident set" in tracker.report()
    html = tracker._repr_html_()
    assert "&lt;load&gt;" in html
    assert "<load>" not in html


def test_without_mlx_its_counters_are_unknown() -> None:
    code = (
        "import sys\nfrom bitnet_mlx.memory import MemoryTracker, clear_cache\n"
        "with MemoryTracker() as t, t.scope('a'):\n    pass\n"
        "r = t.snapshot()\n"
        "assert 'mlx.core' not in sys.modules and 'numpy' not in sys.modules\n"
        "print(r.reading.mlx_active, r.mlx_limits.memory, clear_cache(), t.scopes[0].mlx_peak, r.reading.used > 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["None", "None", "0", "None", "True"]
