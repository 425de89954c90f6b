"""The compiled step, made once a process: from the cache on disk where it is whole, else by numba."""

from __future__ import annotations

from typing import Any

_step: Any = None


def compiled_step() -> Any:
    """step(state), compiled for this processor."""
    global _step
    if _step is None:
        import llvmlite.binding as llvm
        from numba import cfunc, int64, njit, void

        from bitnet_mlx.backends.cpu_jit import threads
        from bitnet_mlx.backends.cpu_jit.jobs import work
        from bitnet_mlx.backends.cpu_jit.step import WORK, step

        threads.launch()
        f = cfunc(void(int64, int64), error_model="numpy")(work)
        llvm.add_symbol(WORK, f.address)
        _step = f, njit(void(int64), error_model="numpy", nogil=True)(step)
    return _step[1]
