"""Our kernels on Apple GPUs. Imports little: whoever asks whether it can run may not need it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitnet_mlx.backends.mlx_import import mx

if TYPE_CHECKING:
    from bitnet_mlx.backends.kernels.ops import KernelOps


def missing() -> str | None:
    """Why they cannot run here, or None."""
    if not mx.metal.is_available():
        return "MLX has no Metal device here (that takes a Mac with an M chip, and macOS 14 or newer)"
    if mx.default_device() != mx.gpu:
        return "MLX's default device is set to the CPU"
    return hidden()


def hidden() -> str | None:
    """Why an MLX that was built for Metal cannot work here at all, or None.

    It allocates through the GPU, also for its CPU device; `mx.metal.is_available` tells only how it was built.
    """
    if not mx.metal.is_available() or mx.is_available(mx.gpu):
        return None
    return (
        "MLX finds no Metal device here and allocates nothing without one; sandboxes and some virtual machines hide it"
    )


def make_ops() -> KernelOps:
    """The operations for a model's layers, each kernel checked and chosen on this chip at its first use."""
    from bitnet_mlx.backends.mlx_device import measured_ops

    return measured_ops("metal")
