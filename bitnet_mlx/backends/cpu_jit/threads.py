"""numba's threading layer: chosen once, named, and kept safe.

tbb first (its library is loaded from the `tbb` wheel before numba looks for it), then omp, then workqueue. One lock
keeps two Python threads out of the compiled step, which workqueue would answer by aborting the process. A child forked
under omp would be killed by the OpenMP runtime, so it gets a BackendError instead.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bitnet_mlx.errors import BackendError

_LAYERS = ("tbb", "omp", "workqueue")
_TBB = {"linux": "libtbb.so.12", "darwin": "libtbb.12.dylib"}

_lock = threading.Lock()
_chosen: str | None = None
_owner = 0  # the process that launched the threads
_count: int | None = None


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)  # the parent's may be held by a thread that the child lacks


def _load_tbb() -> None:
    """Load the tbb wheel's library, so that numba's tbb layer finds it by name."""
    name = _TBB.get(sys.platform)
    if name is None:
        return
    for folder in (Path(sys.prefix) / "lib", Path(sys.base_prefix) / "lib"):
        if (folder / name).exists():
            try:
                ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
            except OSError:
                continue  # built for another platform: numba goes on to the next layer
            return


def launch() -> str:
    """Start numba's threads on the best layer there is, once; returns the layer's name."""
    global _chosen, _owner
    if _chosen is None:
        import numba

        _load_tbb()
        if numba.config.THREADING_LAYER == "default":
            numba.config.THREADING_LAYER_PRIORITY = list(_LAYERS)
        try:
            numba.set_num_threads(numba.get_num_threads())  # launches
        except ValueError as error:
            raise BackendError(
                f"[cpu] numba has no threading layer {numba.config.THREADING_LAYER!r} here ({error}); "
                "unset NUMBA_THREADING_LAYER, or install the tbb package"
            ) from error
        _chosen, _owner = numba.threading_layer(), os.getpid()
    return _chosen


def threading_layer() -> str:
    """The layer in use: tbb, omp or workqueue."""
    return launch()


@contextmanager
def exclusive() -> Iterator[int]:
    """Alone in the compiled step, with numba set to our number of threads, which is yielded.

    Raises BackendError in a process forked from one that already runs OpenMP threads.
    """
    import numba

    if launch() == "omp" and os.getpid() != _owner:
        raise BackendError(
            "[cpu] this process was forked from one that runs the cpu engine on OpenMP threads, which cannot continue in a "
            "child; start the child with the spawn method, or install the tbb package"
        )
    with _lock:
        before, count = numba.get_num_threads(), get_threads()
        if count == before:
            yield count
            return
        numba.set_num_threads(count)
        try:
            yield count
        finally:
            numba.set_num_threads(before)


@functools.cache
def physical_cores() -> int:
    """Physical cores that this process may use: two hardware threads of one core count once."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = set()
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text().strip() if siblings.exists() else str(cpu))
    if sys.platform == "darwin":
        return min(_sysctl("hw.perflevel0.physicalcpu") or _sysctl("hw.physicalcpu") or len(cores), len(cores))
    return max(1, len(cores))


def _sysctl(name: str) -> int:
    """A number that macOS knows by name, or 0."""
    value, size = ctypes.c_int(0), ctypes.c_size_t(4)
    found = ctypes.CDLL(None).sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, 0)
    return value.value if found == 0 else 0


def get_threads() -> int:
    """How many threads the step uses: what set_threads said, or the physical cores."""
    import numba

    return _count if _count is not None else min(physical_cores(), numba.config.NUMBA_NUM_THREADS)


def set_threads(count: int) -> None:
    """Use `count` threads from now on. Raises BackendError outside 1 .. what numba allows here."""
    import numba

    global _count
    if not 1 <= count <= numba.config.NUMBA_NUM_THREADS:
        raise BackendError(
            f"[cpu] {count} threads were asked for; 1 to {numba.config.NUMBA_NUM_THREADS} are allowed here "
            "(NUMBA_NUM_THREADS raises the limit); pass another --threads"
        )
    _count = count
