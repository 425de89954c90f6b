"""How long threads of this process waited for a core: what other processes cost it. Linux tells; other systems do not."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

_TASKS = Path("/proc/self/task")


class Taken(NamedTuple):
    """Seconds of a call; processor seconds of all threads; seconds that all threads waited for a core, None if unknown."""

    wall: float
    processor: float
    delayed: float | None

    def undelayed(self, threads: int) -> float | None:
        """Seconds that the call would take with nobody else on the cores: never below what its own work needs."""
        return None if self.delayed is None else max(self.processor / threads, self.wall - self.delayed)


def take(call: Callable[[], Any]) -> Taken:
    """Make the call and account for its time. Threads that end meanwhile are not counted."""
    before = _delays()
    processor, wall = time.process_time(), time.perf_counter()
    call()
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    after = _delays()
    if not before:
        return Taken(wall, processor, None)
    return Taken(wall, processor, sum(now - before.get(task, 0) for task, now in after.items()) * 1e-9)


def _delays() -> dict[str, int]:
    """Nanoseconds that each thread has waited so far (the second number of its schedstat, Linux's sched-stats.rst)."""
    found = {}
    try:
        for task in _TASKS.iterdir():
            found[task.name] = int((task / "schedstat").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return {}  # another system, or a kernel without these figures
    return found
