"""The GPU that MLX computes on, and the operations that our kernels offer on it."""

from __future__ import annotations

import importlib.metadata
import platform as platform_module
import time
from functools import partial
from pathlib import Path

from bitnet_mlx.backends.kernels.choices import Choices
from bitnet_mlx.backends.kernels.chooser import Measured
from bitnet_mlx.backends.kernels.ops import KernelOps
from bitnet_mlx.backends.kernels.run import run
from bitnet_mlx.backends.kernels.source import Platform
from bitnet_mlx.backends.kernels.tune import Tuner
from bitnet_mlx.backends.mlx_import import mx


def chip() -> str:
    """The name of MLX's default device, such as "Apple M2 Pro"."""
    return str(mx.device_info(mx.default_device()).get("device_name", "unknown"))


def choices(platform: Platform) -> Choices:
    """What is known about our kernels on this chip with this MLX."""
    return Choices(platform, chip(), importlib.metadata.version("mlx"), _system())


def _system() -> str:
    """The version of what compiles kernels: macOS, or NVIDIA's driver."""
    try:
        return Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
    except (OSError, IndexError):
        return platform_module.mac_ver()[0]


def measured(platform: Platform) -> Measured:
    """Checks and times kernels at their first use on this chip."""
    return Measured(platform, Tuner(platform, partial(run, platform=platform)), choices(platform))


def measured_ops(platform: Platform) -> KernelOps:
    """Operations by kernels that are so chosen."""
    return KernelOps(platform, chooser=measured(platform))


def keeps_float32() -> bool:
    """Whether a matrix product of float32 takes its inputs whole on MLX's default device.

    On GPUs with units for matrices, the M5's and NVIDIA's, MLX rounds them to some 11 bits unless MLX_ENABLE_TF32 is 0 as
    the process starts. Ternary products are exact either way: their inputs are int8 codes and -1, 0, 1.
    """
    x = mx.full((256, 256), 1 + 2.0**-20, mx.float32)
    return bool((x @ mx.eye(256) == x).all().item())


def copy_bandwidth(size: int = 256 << 20) -> float:
    """GB/s that are read and written when an array of `size` bytes is copied on MLX's default device; the best of a few."""
    x = mx.ones(size // 4, mx.float32)
    mx.eval(x)
    best = 0.0
    for _ in range(6):
        started = time.perf_counter()
        y = x + 1
        mx.eval(y)
        best = max(best, 2 * x.nbytes / (time.perf_counter() - started) / 1e9)
        x = y
    return best
