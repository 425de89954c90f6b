"""The compiled step, made once a process: from the cache on disk where it is whole, else by numba."""

from __future__ import annotations

from typing import Any

_step: Any = None


def compiled_step() -> Any:
    """step(state), compiled for this processor."""
    global _step
    if _step is None:
        from numba import int64, njit, void

        from bitnet_mlx.backends.cpu_jit import threads
        from bitnet_mlx.backends.cpu_jit.floats import OPTIONS
        from bitnet_mlx.backends.cpu_jit.step import step

        threads.launch()
        _step = njit(void(int64[::1]), **OPTIONS)(step)
    return _step
