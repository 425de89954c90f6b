"""The examination: machine, engines, products at real shapes, and our kernels where there is a GPU for them."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence

from bitnet_mlx import __version__
from bitnet_mlx.backends import choose, missing
from bitnet_mlx.backends.kernels.source import PLATFORMS, Platform
from bitnet_mlx.doctor import machine, products
from bitnet_mlx.doctor.engines import engines
from bitnet_mlx.doctor.products import Shape
from bitnet_mlx.doctor.report import Machine, Report


def examine(progress: Callable[[str], None] = lambda text: None, shapes: Sequence[Shape] | None = None) -> Report:
    """Look at this machine; run every engine on the embedded model, and products. progress: is told each step.

    shapes: of the products; by default those of the embedded model and of bitnet-b1.58-2B-4T.
    """
    shapes = products.SHAPES if shapes is None else shapes
    choice = choose("auto")
    gpu: Platform | None = next((name for name in PLATFORMS if not missing(name)), None)
    progress("machine")
    here = machine.machine(gpu)
    report = Report(
        __version__, platform.python_version(), here, machine.packages(), choice.name, choice.reason, engines(progress)
    )
    if gpu is None:
        report.products = products.products(progress, shapes, here.bandwidth)
    else:
        _kernels(report, here, gpu, shapes, progress)
    return report


def _kernels(
    report: Report, here: Machine, gpu: Platform, shapes: Sequence[Shape], progress: Callable[[str], None]
) -> None:
    from bitnet_mlx.backends.mlx_device import measured
    from bitnet_mlx.doctor.kernels_mlx import KernelDoctor

    doctor = KernelDoctor(measured(gpu), here, progress)
    report.products = doctor.products(shapes)
    report.kernels = doctor.row_kernels(shapes)
    report.switched_off = doctor.switched_off()
