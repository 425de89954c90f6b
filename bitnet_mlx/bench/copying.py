"""How fast this machine copies memory: the ceiling that a step bound by memory is held against."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

_BYTES = 128 << 20  # larger than a last-level cache


def copy_bandwidth(threads: int, size: int = _BYTES, repeats: int = 5) -> float:
    """Bytes a second that `threads` threads read and write together when they copy `size` bytes; the best of a few."""
    source, target = np.ones(size // 8), np.zeros(size // 8)
    parts = list(zip(np.array_split(source, threads), np.array_split(target, threads), strict=True))
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            start = time.perf_counter()
            list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), parts))  # numpy lets other threads run meanwhile
            best = max(best, 2 * source.nbytes / (time.perf_counter() - start))
    return best


def machine_copy(backend: str, threads: int | None = None) -> float:
    """Bytes a second of a copy through the memory that a backend computes from, with the threads that it would use."""
    if backend in ("metal", "cuda"):
        from bitnet_mlx.backends.mlx_device import copy_bandwidth as on_device

        return on_device() * 1e9
    return copy_bandwidth(threads or cpu_threads(backend))


def cpu_threads(backend: str) -> int:
    """Threads that a CPU engine uses: its own number for cpu, one elsewhere (numpy's loops, MLX's CPU device)."""
    if backend != "cpu":
        return 1
    from bitnet_mlx.backends.cpu_jit.threads import get_threads

    return get_threads()
