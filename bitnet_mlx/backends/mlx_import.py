"""The one place that imports MLX for our layers, so that its absence is one clear error wherever it is met first."""

from __future__ import annotations

from bitnet_mlx.errors import BackendError

try:
    import mlx.core as mx
    from mlx import nn
except ImportError as error:
    raise BackendError(
        f"[mlx] the mlx backend needs MLX, which does not import here ({error}); MLX runs on macOS and Linux; "
        "install mlx (macOS) or mlx[cpu] (Linux), or choose --backend cpu or numpy"
    ) from error

__all__ = ["mx", "nn"]
