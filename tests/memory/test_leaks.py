"""What outlives its scope is found, and whoever holds it is named."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from bitnet_mlx.memory import MemoryTracker

kept: list[object] = []


class Cache:
    """Something with nbytes that a weak reference may point to."""

    def __init__(self, count: int = 1000) -> None:
        self.values = np.ones(count)
        self.friend: Cache | None = None

    @property
    def nbytes(self) -> int:
        return self.values.nbytes


class Session:
    def __init__(self) -> None:
        self.cache: Cache | None = None


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    kept.clear()


def test_what_is_dropped_is_no_leak() -> None:
    tracker = MemoryTracker()
    with tracker.scope("reply"):
        cache = Cache()
        tracker.own(cache, "kv_cache")
        assert tracker.owners()["kv_cache"] == 8000
    assert tracker.owners()["kv_cache"] == 8000
    del cache
    assert tracker.leaks() == []
    assert tracker.owners()["kv_cache"] == 0


def test_a_kept_cache_is_found_and_its_holder_named() -> None:
    tracker = MemoryTracker(clock=iter(range(100)).__next__)
    with tracker.scope("serve"), tracker.scope("reply"):
        kept.append(Cache())
        tracker.own(kept[0], "kv_cache", "chat 7")
    (leak,) = tracker.leaks()
    assert (leak.scope, leak.owner, leak.label, leak.nbytes) == ("serve/reply", "kv_cache", "chat 7", 8000)
    assert leak.age_s > 0
    assert leak.held_by[0] == f"'kept' of module {__name__}, in a list"
    assert "chat 7 (kv_cache, 8000 bytes) outlived scope 'serve/reply'" in str(leak)


def test_holders_of_every_kind() -> None:
    tracker = MemoryTracker()
    session = Session()

    def waiting() -> Iterator[int]:
        cache = Cache()
        tracker.own(cache, "kv_cache", "in a generator")
        yield 1

    with tracker.scope("x"):
        session.cache = Cache(5)
        tracker.own(session.cache, "kv_cache", "attribute")
        local = Cache(4)
        tracker.own(local, "kv_cache", "local")
        table = {"a": Cache(3)}
        tracker.own(table["a"], "kv_cache", "in a dict")
        generator = waiting()
        next(generator)
    held = {leak.label: leak.held_by[0] for leak in tracker.leaks()}
    here = "test_holders_of_every_kind(), which runs"
    assert held == {
        "attribute": "Session.cache",
        "local": f"'local' of {here}",
        "in a dict": f"'table' of {here}, under 'a'" if "table" in held["in a dict"] else held["in a dict"],
        "in a generator": "a local variable of waiting(), which waits",
    }
    generator.close()


def test_looking_for_leaks_keeps_nothing_alive() -> None:
    tracker = MemoryTracker()
    with tracker.scope("x"):
        local = Cache()
        tracker.own(local, "kv_cache")
    assert len(tracker.leaks()) == 1
    del local
    assert tracker.leaks() == []


def test_a_circle_is_no_leak() -> None:
    tracker = MemoryTracker()
    with tracker.scope("x"):
        one, two = Cache(), Cache()
        one.friend, two.friend = two, one
        tracker.own(one, "kv_cache")
    del one, two
    assert tracker.leaks() == []


def test_what_may_stay_is_no_leak() -> None:
    tracker = MemoryTracker()
    with tracker.scope("load"):
        early, late = Cache(), Cache()
        tracker.own(early, "weights", keep=True)
        tracker.own(late, "weights")
    assert [leak.owner for leak in tracker.leaks()] == ["weights"]
    tracker.keep(late)
    assert tracker.leaks() == []


def test_the_largest_comes_first() -> None:
    tracker = MemoryTracker()
    with tracker.scope("x"):
        kept.extend(Cache(n) for n in (1, 3, 2))
        for cache in kept:
            tracker.own(cache, "kv_cache")
    assert [leak.nbytes for leak in tracker.leaks()] == [24, 16, 8]
