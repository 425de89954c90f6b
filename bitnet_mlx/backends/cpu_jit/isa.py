"""Which body the ternary product is compiled with: avx2, sdot, or plain for anything else.

The choice is made from the processor's features before anything compiles, since LLVM aborts the process on an
intrinsic that the processor lacks. BITNET_MLX_CPU_BODY forces one.
"""

from __future__ import annotations

import os
import platform
from types import ModuleType

from bitnet_mlx.errors import BackendError

VARIABLE = "BITNET_MLX_CPU_BODY"
BODIES = ("avx2", "sdot", "plain")


def features() -> tuple[str, dict[str, bool]]:
    """Name and features of the processor that numba compiles for: NUMBA_CPU_NAME and NUMBA_CPU_FEATURES, or the host."""
    import llvmlite.binding as llvm
    from numba import config

    name = config.CPU_NAME or llvm.get_host_cpu_name()
    if config.CPU_FEATURES is None:
        return name, dict(llvm.get_host_cpu_features())
    asked = [f.strip() for f in config.CPU_FEATURES.split(",")]
    return name, {f[1:]: f[0] == "+" for f in asked if f[:1] in ("+", "-")}


def runnable() -> tuple[str, ...]:
    """The bodies that this processor can run, best first."""
    machine = platform.machine().lower()
    name, has = features()
    if machine in ("x86_64", "amd64") and has.get("avx2"):
        return ("avx2", "plain")
    if machine in ("aarch64", "arm64") and (has.get("dotprod") or name.startswith("apple-m")):
        return ("sdot", "plain")
    return ("plain",)


def body_name() -> str:
    """The body to compile. Raises BackendError for a forced body that the processor lacks."""
    allowed = runnable()
    forced = os.environ.get(VARIABLE, "")
    if not forced:
        return allowed[0]
    if forced not in allowed:
        raise BackendError(
            f"[cpu] {VARIABLE} is {forced!r}; this processor runs {' or '.join(allowed)}; unset it or choose one of these"
        )
    return forced


def body(name: str | None = None) -> ModuleType:
    """The module of a body, the chosen one by default."""
    name = name or body_name()
    if name == "avx2":
        from bitnet_mlx.backends.cpu_jit import avx2

        return avx2
    if name == "sdot":
        from bitnet_mlx.backends.cpu_jit import arm64

        return arm64
    from bitnet_mlx.backends.cpu_jit import plain

    return plain
