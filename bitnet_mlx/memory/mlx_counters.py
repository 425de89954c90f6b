"""MLX's own counters, and the limits that we set. MLX is looked at only where something else has imported it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from bitnet_mlx.errors import BackendError, ConfigError


@dataclass(frozen=True)
class MlxCounters:
    """Bytes. active: in arrays. cache: freed and kept for the next array. peak: the most active since the last reset."""

    active: int
    cache: int
    peak: int


@dataclass(frozen=True)
class Limits:
    """Bytes; None is unknown. MLX tells its memory limit alone; the cache's and the wired one are what was set here."""

    memory: int | None = None
    cache: int | None = None
    wired: int | None = None


_set = Limits()


def core() -> Any:
    """mlx.core if it has been imported in this process, else None."""
    return sys.modules.get("mlx.core")


def counters() -> MlxCounters | None:
    """The counters now; None where MLX is not in use."""
    mx = core()
    if mx is None:
        return None
    active = mx.get_active_memory()
    return MlxCounters(active, mx.get_cache_memory(), max(mx.get_peak_memory(), active))  # a reset peak starts from 0


def limits() -> Limits:
    """What holds now, as far as it is known."""
    mx = core()
    memory = mx.get_memory_limit() if mx is not None else None
    return Limits(memory, _set.cache, _set.wired)


def set_limits(memory: int | None = None, cache: int | None = None, wired: int | None = None) -> Limits:
    """Set MLX's limits, in bytes, and remember them; None leaves one as it is. Returns what holds now.

    memory: past it MLX waits and frees before it allocates. cache: freed memory that is kept. wired: memory that macOS
    may not page out (macOS 15 or newer, a Metal device). Raises ConfigError for a negative one, BackendError without MLX
    or where the device knows no wired memory.
    """
    global _set
    for name, value in (("memory", memory), ("cache", cache), ("wired", wired)):
        if value is not None and value < 0:
            raise ConfigError(f"[memory] the {name} limit is {value} bytes; 0 or more is allowed")
    try:
        import mlx.core as mx
    except ImportError as error:
        raise BackendError(f"[memory] MLX cannot be imported ({error}), so it has no limits to set") from error
    if memory is not None:
        mx.set_memory_limit(memory)
    if cache is not None:
        mx.set_cache_limit(cache)
        _set = Limits(None, cache, _set.wired)
    if wired is not None:
        try:
            mx.set_wired_limit(wired)
        except (RuntimeError, ValueError) as error:
            raise BackendError(f"[memory] MLX refuses a wired limit of {wired} bytes here: {error}") from error
        _set = Limits(None, _set.cache, wired)
    return limits()


def clear_cache() -> int:
    """Give MLX's cache back to the system. Returns the bytes that were freed; 0 where MLX is not in use."""
    mx = core()
    if mx is None:
        return 0
    before = mx.get_cache_memory()
    mx.clear_cache()
    return max(before - mx.get_cache_memory(), 0)
