"""Pressure levels, call-backs with their cool-down, and what a tracker does about it."""

from __future__ import annotations

import pytest

from bitnet_mlx.errors import ConfigError, MemoryLimitError
from bitnet_mlx.memory import MemoryTracker, system
from bitnet_mlx.memory.pressure import LEVELS, PressureWatch, level_of
from bitnet_mlx.memory.records import PressureEvent

SHARE = {"none": 0.5, "low": 0.7, "medium": 0.8, "high": 0.9, "critical": 0.95}


class World:
    """A clock and a resident set that a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.time, self.share = 0.0, 0.0
        monkeypatch.setattr(system, "resident_bytes", lambda: int(self.share * (1 << 40)) + 1)

    def tracker(self, **options: object) -> MemoryTracker:
        return MemoryTracker(1 << 40, clock=lambda: self.time, **options)  # type: ignore[arg-type]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def test_levels_begin_at_their_shares() -> None:
    shares = [0.0, 0.699, 0.7, 0.799, 0.8, 0.899, 0.9, 0.949, 0.95, 1.0, 1.7]
    names = [LEVELS[level_of(share)] for share in shares]
    assert names == ["none", "none", "low", "low", "medium", "medium", "high", "high", *["critical"] * 3]


def test_a_call_back_fires_once_in_a_cool_down(world: World) -> None:
    tracker = world.tracker(cooldown_s=30)
    told: list[PressureEvent] = []
    tracker.on_pressure(told.append, at="medium")
    world.share = SHARE["low"]
    tracker.sample()
    assert told == []
    world.share = SHARE["high"]
    for world.time in (1.0, 2.0, 29.0, 30.9):
        tracker.sample()
    assert [event.time_s for event in told] == [1.0]
    for world.time in (31.0, 32.0, 60.0):
        tracker.sample()
    assert [event.time_s for event in told] == [1.0, 31.0]
    assert (told[0].level, told[0].share, told[0].limit) == ("high", pytest.approx(0.9), 1 << 40)
    assert tracker.events == told


def test_a_rise_ends_the_wait_and_so_does_relief(world: World) -> None:
    tracker = world.tracker(cooldown_s=30)
    told: list[str] = []
    tracker.on_pressure(lambda event: told.append(event.level))
    for level in ("low", "low", "high", "medium", "high", "critical", "none", "low"):
        world.share = SHARE[level]
        tracker.sample()
    assert told == ["low", "high", "critical", "low"]


def test_a_call_back_that_fails_is_heard(world: World) -> None:
    tracker = world.tracker()

    def fail(_: PressureEvent) -> None:
        raise RuntimeError("no")

    tracker.on_pressure(fail)
    world.share = 0.75
    with pytest.raises(RuntimeError, match="no"):
        tracker.sample()
    tracker.sample()  # it waits now, and the tracker goes on


def test_without_a_limit_the_machine_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "total_bytes", lambda: 1000)
    monkeypatch.setattr(system, "available_bytes", lambda: 120)
    assert MemoryTracker().snapshot().level == "medium"
    monkeypatch.setattr(system, "available_bytes", lambda: None)
    assert MemoryTracker().snapshot().level == "none"


class Cache:
    """A KV cache with room to give back."""

    def __init__(self) -> None:
        self.nbytes = 100

    def shrink(self) -> int:
        freed, self.nbytes = self.nbytes - 40, 40
        return freed


def test_an_acting_tracker_trims_and_then_refuses(world: World) -> None:
    tracker = world.tracker(act=True)
    cache = Cache()
    tracker.own(cache, "kv_cache")
    world.share = SHARE["medium"]
    tracker.sample()
    assert cache.nbytes == 100
    tracker.admit()
    world.share = SHARE["high"]
    tracker.sample()
    assert cache.nbytes == 40
    tracker.admit()
    world.share = SHARE["critical"]
    with pytest.raises(MemoryLimitError, match=r"a prompt is refused: 95% of the limit"):
        tracker.admit(what="a prompt")


def test_a_watching_tracker_only_refuses_what_cannot_fit(world: World) -> None:
    tracker = world.tracker()
    cache = Cache()
    tracker.own(cache, "kv_cache")
    world.share = 0.96
    tracker.sample()
    assert cache.nbytes == 100
    tracker.admit(1 << 30)
    with pytest.raises(MemoryLimitError, match="are left"):
        tracker.admit(1 << 39)
    assert tracker.relieve() >= 60
    assert cache.nbytes == 40


@pytest.mark.parametrize(
    "shares", [(0.9, 0.8, 0.85, 0.95), (0.5, 0.6, 0.7), (0.0, 0.8, 0.9, 0.95), (0.7, 0.8, 0.9, 1.1)]
)
def test_shares_that_cannot_be(shares: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="ascending shares"):
        PressureWatch(shares)


def test_other_options_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="cool-down"):
        PressureWatch(cooldown_s=-1)
    with pytest.raises(ConfigError, match="pressure level 'hot'"):
        MemoryTracker().on_pressure(print, at="hot")
    with pytest.raises(ConfigError, match="the limit is 0"):
        MemoryTracker(0)
