"""The compiled step, made once a process: from the cache on disk where that is whole, else by numba (some seconds)."""

from __future__ import annotations

import importlib.util
import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bitnet_mlx.backends.cache_root import VARIABLE, cache_root
from bitnet_mlx.backends.cpu_jit import cachefolder, threads
from bitnet_mlx.errors import BackendError

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_kept: tuple[Any, Callable[[int], None]] | None = None  # the C function `work`, and the step that calls it


def available() -> bool:
    """Whether numba is installed, without importing it."""
    return importlib.util.find_spec("numba") is not None


def compiled_step() -> Callable[[int], None]:
    """step(address of the state), compiled for this processor. Raises BackendError without numba."""
    global _kept
    if not available():
        raise BackendError(
            "[cpu] numba is not installed; the cpu engine needs it; pip install numba, or use --backend numpy"
        )
    with _lock:
        if _kept is None:
            threads.launch()  # the code's links to numba's threads must exist before it is loaded
            _kept = _load()
        return _kept[1]


def compiled_worker() -> Callable[[int, int], None]:
    """work(address of the state, worker): takes items of the state's job until none is left; the GIL is released."""
    compiled_step()
    assert _kept is not None
    return _kept[0].ctypes


def _load() -> tuple[Any, Callable[[int], None]]:
    """From the cache folder, or compiled into it; compiled without it where nothing can be written."""
    name = cachefolder.key()
    ready = cache_root() / "numba" / name
    if cachefolder.is_whole(ready):
        return _build(ready)
    _log.info("[cpu] compiling for this processor: once, some ten seconds")
    try:
        folder = cachefolder.draft(name)
    except OSError as error:
        _log.warning("[cpu] compiled code is not kept: %s; set %s to a writable folder", error, VARIABLE)
        return _build(None)
    try:
        built = _build(folder)
        cachefolder.publish(folder, name)
    except OSError as error:  # a full disk
        _log.warning("[cpu] compiled code is not kept: %s", error)
        shutil.rmtree(folder, ignore_errors=True)
        return _build(None)
    return built


def _build(folder: Path | None) -> tuple[Any, Callable[[int], None]]:
    """Load from, or compile into, a folder."""
    import llvmlite.binding as llvm
    from numba import cfunc, config, int64, njit, void

    from bitnet_mlx.backends.cpu_jit.jobs import work
    from bitnet_mlx.backends.cpu_jit.step import WORK, step

    before, kept = config.CACHE_DIR, folder is not None
    if folder is not None:
        config.CACHE_DIR = str(folder)  # read by numba when it is told to cache, so for these two alone
    try:
        worker = cfunc(void(int64, int64), cache=kept, error_model="numpy")(work)
        llvm.add_symbol(WORK, worker.address)
        return worker, njit(void(int64), cache=kept, error_model="numpy", nogil=True)(step)
    finally:
        config.CACHE_DIR = before
