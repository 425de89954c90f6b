"""Our kernels on NVIDIA GPUs, through MLX's CUDA back end. Imports little: whoever asks whether it can run may not need it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitnet_mlx.backends.mlx_import import mx

if TYPE_CHECKING:
    from bitnet_mlx.backends.kernels.ops import KernelOps


def missing() -> str | None:
    """Why they cannot run here, or None."""
    if not mx.cuda.is_available():
        return "MLX has no CUDA device here (that takes Linux, an NVIDIA GPU and the package mlx[cuda13])"
    return None if mx.default_device() == mx.gpu else "MLX's default device is set to the CPU"


def make_ops() -> KernelOps:
    """The operations for a model's layers, each kernel checked and chosen on this chip at its first use."""
    from bitnet_mlx.backends.mlx_device import measured_ops

    return measured_ops("cuda")
