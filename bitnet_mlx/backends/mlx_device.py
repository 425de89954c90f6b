"""The GPU that MLX computes on, and the operations that our kernels offer on it."""

from __future__ import annotations

import importlib.metadata
from functools import partial

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
    return Choices(platform, chip(), importlib.metadata.version("mlx"))


def measured_ops(platform: Platform) -> KernelOps:
    """Operations whose kernels are checked and chosen by measuring, at their first use on this chip."""
    tuner = Tuner(platform, partial(run, platform=platform))
    return KernelOps(platform, chooser=Measured(platform, tuner, choices(platform)))
