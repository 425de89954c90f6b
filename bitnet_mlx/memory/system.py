"""What the operating system tells: memory of this process and of the machine, in bytes, None where it does not tell; and the
processor's name.
"""

from __future__ import annotations

import os
import platform
import sys
from functools import lru_cache
from pathlib import Path

from bitnet_mlx.memory.darwin import Mach

_CGROUP = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
_CGROUP_ROOT = "/sys/fs/cgroup"


@lru_cache(maxsize=1)
def _mach() -> Mach | None:
    return Mach() if sys.platform == "darwin" else None


def processor() -> str:
    """The processor's name as its system gives it."""
    mach = _mach()
    if mach is not None:
        return mach.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux: Python's own answer follows
    return platform.processor() or platform.machine()


def resident_bytes() -> int | None:
    """This process's resident set, mapped file pages included."""
    mach = _mach()
    if mach is not None:
        task = mach.task()
        return None if task is None else task[0]
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return None


def footprint_bytes() -> int | None:
    """What macOS charges this process for, compressed and GPU memory included; None on other systems."""
    mach = _mach()
    task = None if mach is None else mach.task()
    return None if task is None else task[1]


def peak_resident_bytes() -> int | None:
    """The largest resident set so far (Linux VmHWM; macOS ru_maxrss)."""
    if sys.platform.startswith("linux"):
        found = _table("/proc/self/status", "VmHWM:")
        if found is not None:
            return found
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def total_bytes(root: str = _CGROUP_ROOT) -> int | None:
    """Memory that this machine, or the container that the process runs in, has."""
    mach = _mach()
    if mach is not None:
        return mach.total()
    total = _table("/proc/meminfo", "MemTotal:")
    limit = _cgroup(root)
    return total if limit is None or (total is not None and limit[0] > total) else limit[0]


def available_bytes(root: str = _CGROUP_ROOT) -> int | None:
    """Memory that can be had without swapping; in a container at most what is left of its limit."""
    mach = _mach()
    if mach is not None:
        return mach.available()
    free = _table("/proc/meminfo", "MemAvailable:")
    limit = _cgroup(root)
    if limit is None or free is None:
        return free
    return min(free, max(limit[0] - limit[1], 0))


def _table(path: str, key: str) -> int | None:
    """A value of "key   number kB" lines."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith(key):
                    return int(line.split()[1]) * 1024
    except (OSError, IndexError, ValueError):
        return None
    return None


def _cgroup(root: str) -> tuple[int, int] | None:
    """(limit, used) of the container, by control groups of either version; None without a limit."""
    place = _cgroup_files(root)
    if place is None:
        return None
    try:
        return int(place[0].read_text(encoding="ascii")), int(place[1].read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


@lru_cache(maxsize=8)
def _cgroup_files(root: str) -> tuple[Path, Path] | None:
    """The two files of a container with a limit; looked for once."""
    for limit, used in _CGROUP:
        try:
            int(Path(root, limit).read_text(encoding="ascii"))
            return Path(root, limit), Path(root, used)
        except (OSError, ValueError):  # "max" is no number
            continue
    return None
