"""MemoryTracker: counters, scopes, owners, a timeline, leaks and pressure of one process.

    with MemoryTracker() as tracker:
        model, tokenizer = load()
        generate(model, tokenizer, "import ")
    print(tracker.report())

While a tracker is in use (`with`), load and the generation loop name their scopes and owners by themselves; without one
they ask `current()` once a step and do nothing.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bitnet_mlx.errors import ConfigError, MemoryLimitError
from bitnet_mlx.memory import mlx_counters, system
from bitnet_mlx.memory.owners import Holding, Holdings, Parts, parts_of
from bitnet_mlx.memory.pressure import COOLDOWN_S, LEVELS, SHARES, Callback, PressureWatch, level_of
from bitnet_mlx.memory.records import OWNERS, Leak, PressureEvent, Reading, Sample, ScopeRecord, Snapshot
from bitnet_mlx.memory.timeline import Timeline

INTERVAL_S = 0.25  # a sample reads /proc: some 0.5 ms; peaks between two come from MLX's and the system's own counters
_trackers: list[MemoryTracker] = []


def current() -> MemoryTracker | None:
    """The tracker in use, the innermost; None where nobody looks."""
    return _trackers[-1] if _trackers else None


def tick() -> None:
    """For loops: a sample of the tracker in use, if there is one and its interval has passed."""
    if _trackers:
        _trackers[-1].tick()


@contextlib.contextmanager
def scope(name: str) -> Iterator[ScopeRecord | None]:
    """A scope of the tracker in use; nothing where nobody looks."""
    if not _trackers:
        yield None
        return
    with _trackers[-1].scope(name) as record:
        yield record


class _Open:
    """A scope that has not ended."""

    def __init__(self, number: int, record: ScopeRecord, peak_rss: int | None) -> None:
        self.number, self.record, self.peak_rss = number, record, peak_rss
        self.thread = threading.get_ident()  # a generator may be closed by another one


class MemoryTracker:
    """One process's memory. All methods may be called from any thread.

    limit: bytes that pressure is measured against: this process's use over it. None measures the machine's: what is not
    available over what there is. act: at medium pressure MLX's cache is given back, at high the unused room of KV caches
    as well, and at critical `admit` refuses. interval_s: of the timeline. clock: seconds, for tests.
    MLX's own peak counter starts anew at each scope; `peak_mlx` has the whole.
    """

    def __init__(
        self,
        limit: int | None = None,
        *,
        act: bool = False,
        shares: Sequence[float] = SHARES,
        cooldown_s: float = COOLDOWN_S,
        interval_s: float = INTERVAL_S,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Raises ConfigError for a limit of 0 or less, or pressure shares that cannot be."""
        if limit is not None and limit <= 0:
            raise ConfigError(f"[memory] the limit is {limit} bytes; a number above 0 is needed")
        self._lock = threading.RLock()
        self._clock, self._start = clock, clock()
        self._limit, self.total = limit, system.total_bytes()
        self._act = act
        self._watch = PressureWatch(shares, cooldown_s)
        self._timeline = Timeline(interval_s)
        self._holdings = Holdings()
        self._stacks: dict[int, list[_Open]] = {}
        self._numbers = 0
        self.scopes: list[ScopeRecord] = []
        self.events: list[PressureEvent] = []
        self.peak_used = 0
        self.peak_mlx: int | None = None
        self._cpu_s = 0.0
        if act:
            self._watch.add(lambda _: mlx_counters.clear_cache(), "medium")
            self._watch.add(lambda _: self.relieve(), "high")

    def __enter__(self) -> MemoryTracker:
        _trackers.append(self)
        self.sample()
        return self

    def __exit__(self, *_: object) -> None:
        self.sample()
        _trackers.remove(self)

    # What is measured

    def now(self) -> float:
        """Seconds since the tracker was made."""
        return self._clock() - self._start

    def read(self) -> Reading:
        """The counters now."""
        mlx = mlx_counters.counters()
        reading = Reading(
            self.now(),
            mlx.active if mlx else None,
            mlx.cache if mlx else None,
            mlx.peak if mlx else None,
            system.resident_bytes(),
            system.footprint_bytes(),
            system.available_bytes(),
        )
        with self._lock:
            self.peak_used = max(self.peak_used, reading.used)
            self._fold(reading.mlx_peak)
        return reading

    def _fold(self, mlx_peak: int | None) -> None:
        """Hand MLX's peak to all who wait for one."""
        if mlx_peak is None:
            return
        self.peak_mlx = max(self.peak_mlx or 0, mlx_peak)
        for opened in (o for stack in self._stacks.values() for o in stack):
            opened.record.mlx_peak = max(opened.record.mlx_peak or 0, mlx_peak)

    def owners(self, reading: Reading | None = None) -> dict[str, int]:
        """Bytes by owner now. MLX arrays that nobody registered are activations; "other" is the rest of the process."""
        reading = reading or self.read()
        with self._lock:
            found, on_mlx = self._holdings.totals()
        if on_mlx and reading.mlx_active is not None:
            found["activations"] += max(reading.mlx_active - on_mlx, 0)
        return {**found, OWNERS[-1]: max(reading.used - sum(found.values()), 0)}

    def sample(self) -> Sample:
        """A point of the timeline now; pressure is looked at, and call-backs run in this thread."""
        started = time.thread_time()
        reading = self.read()
        owners = self.owners(reading)
        with self._lock:
            sample = Sample(reading.time_s, reading.used, reading.mlx_active, owners, self._here())
            self._timeline.add(sample)
            for opened in (o for stack in self._stacks.values() for o in stack):
                record = opened.record
                record.peak_used = max(record.peak_used, reading.used)
                for owner, nbytes in owners.items():
                    record.owner_peaks[owner] = max(record.owner_peaks.get(owner, 0), nbytes)
            self._cpu_s += time.thread_time() - started
        self._press(reading)
        return sample

    def tick(self) -> None:
        """A sample, if the interval has passed since the last: cheap enough for every token."""
        if self._timeline.due(self.now()):
            self.sample()

    def snapshot(self) -> Snapshot:
        """Everything now."""
        reading = self.read()
        level = LEVELS[level_of(self._share(reading), self._watch.shares)]
        limits = mlx_counters.limits()
        return Snapshot(reading, self.owners(reading), self._here(), level, self._limit, self.total, limits)

    @property
    def timeline(self) -> list[Sample]:
        """The samples so far, thinned out evenly where there were many."""
        with self._lock:
            return list(self._timeline.samples)

    @property
    def sampling_s(self) -> float:
        """Processor time that sampling took."""
        return self._cpu_s

    # Scopes and owners

    def _here(self) -> str:
        stack = self._stacks.get(threading.get_ident())
        return stack[-1].record.name if stack else ""

    @contextlib.contextmanager
    def scope(self, name: str) -> Iterator[ScopeRecord]:
        """Name what runs inside; scopes of one thread nest."""
        opened = self._enter_scope(name)
        try:
            yield opened.record
        finally:
            self._leave_scope(opened)

    def _enter_scope(self, name: str) -> _Open:
        before = self.read()
        mx = mlx_counters.core()
        if mx is not None:
            mx.reset_peak_memory()
        with self._lock:
            self._numbers += 1
            path = f"{self._here()}/{name}".lstrip("/")
            record = ScopeRecord(path, threading.current_thread().name, before.time_s, before)
            opened = _Open(self._numbers, record, system.peak_resident_bytes())
            self._stacks.setdefault(threading.get_ident(), []).append(opened)
        self.sample()
        return opened

    def _leave_scope(self, opened: _Open) -> None:
        sample_owners = self.sample().owners
        record, peak = opened.record, system.peak_resident_bytes()
        with self._lock:
            if peak is not None and opened.peak_rss is not None and peak > opened.peak_rss:
                record.peak_used = max(record.peak_used, peak)
                self.peak_used = max(self.peak_used, peak)
            record.after = self.read()
            record.seconds = record.after.time_s - record.start_s
            record.owners = sample_owners
            self.scopes.append(record)
            self._holdings.end(opened.number, record.after.time_s)
            stack = self._stacks[opened.thread]
            stack.remove(opened)
            if not stack:
                del self._stacks[opened.thread]

    def own(
        self,
        thing: Any,
        owner: str | Parts,
        label: str | None = None,
        nbytes: int | None = None,
        *,
        keep: bool = False,
        on_mlx: bool = False,
    ) -> None:
        """Register what holds memory, by weak reference.

        owner: a name of OWNERS, or a function thing -> bytes by owner, called at each sample. nbytes: a fixed number;
        None asks `thing.nbytes` each time. keep: it may outlive the scope it was registered in. on_mlx: MLX counts it.
        Raises ConfigError for an unknown owner, or a thing whose bytes are not to be found.
        """
        parts = parts_of(thing, owner, nbytes)
        with self._lock:
            stack = self._stacks.get(threading.get_ident())
            inside = stack[-1] if stack else None
            number, name = (None, "") if keep or inside is None else (inside.number, inside.record.name)
            label = label or type(thing).__name__
            self._holdings.add(Holding(weakref.ref(thing), parts, label, on_mlx, number, name))

    def keep(self, thing: Any) -> None:
        """What was registered may outlive its scope after all."""
        with self._lock:
            self._holdings.keep(thing)

    def leaks(self) -> list[Leak]:
        """What should be gone and is not, the largest first. Python's collector runs first, so that circles are no leaks."""
        gc.collect()
        with self._lock:
            return self._holdings.leaks(self.now())

    # Pressure

    def on_pressure(self, callback: Callback, at: str = "low") -> None:
        """Call `callback` with a PressureEvent at this level and above: once in a cool-down, and at once when it rises."""
        with self._lock:
            self._watch.add(callback, at)

    def _share(self, reading: Reading) -> float:
        if self._limit is not None:
            return reading.used / self._limit
        if self.total is None or reading.available is None:
            return 0.0
        return 1 - min(reading.available, self.total) / self.total

    def _press(self, reading: Reading) -> None:
        share = self._share(reading)
        level = level_of(share, self._watch.shares)
        with self._lock:
            due = self._watch.due(level, reading.time_s)
            if due:
                limit = self._limit if self._limit is not None else (self.total or 0)
                event = PressureEvent(LEVELS[level], share, reading.used, limit, reading.time_s)
                self.events.append(event)
        for callback in due:
            callback(event)

    def relieve(self) -> int:
        """Give back MLX's cache and the unused room of registered KV caches; returns the bytes freed.

        Caches are shrunk in this thread: call it where no other thread runs the model.
        """
        with self._lock:
            caches = [thing for thing in self._holdings.things("kv_cache") if hasattr(thing, "shrink")]
        return sum(cache.shrink() for cache in caches) + mlx_counters.clear_cache()

    def admit(self, nbytes: int = 0, what: str = "the request") -> None:
        """Let work begin that needs `nbytes` more, or raise MemoryLimitError: at critical pressure where the tracker acts,
        and where the bytes would pass the limit.
        """
        reading = self.read()
        share = self._share(reading)
        if self._act and LEVELS[level_of(share, self._watch.shares)] == LEVELS[-1]:
            raise MemoryLimitError(
                f"[memory] {what} is refused: {share:.0%} of the limit is in use; wait, end other work, or raise the limit"
            )
        if self._limit is not None and reading.used + nbytes > self._limit:
            raise MemoryLimitError(
                f"[memory] {what} needs {nbytes} bytes and {max(self._limit - reading.used, 0)} of {self._limit} are left; "
                "ask for a shorter context, or raise the limit"
            )

    def report(self) -> str:
        """A table for people."""
        from bitnet_mlx.memory.show import tracker_table

        return tracker_table(self)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        from dataclasses import asdict

        return {
            "snapshot": self.snapshot().record(), "peak_used": self.peak_used, "peak_mlx": self.peak_mlx,
            "scopes": [scope.record() for scope in self.scopes], "leaks": [asdict(leak) for leak in self.leaks()],
            "events": [asdict(event) for event in self.events], "sampling_s": self.sampling_s,
            "timeline": [asdict(sample) for sample in self.timeline],
        }  # fmt: skip

    def _repr_html_(self) -> str:
        from bitnet_mlx.memory.show import tracker_html

        return tracker_html(self)
