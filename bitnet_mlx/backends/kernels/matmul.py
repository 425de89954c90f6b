"""The ternary matrix product for many rows of activations: int8 tensor cores on CUDA, simdgroup matrices on Metal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bitnet_mlx.backends.kernels import mma
from bitnet_mlx.backends.kernels.launch import Launch
from bitnet_mlx.backends.kernels.layout import Layout
from bitnet_mlx.backends.kernels.mma import MmaVariant
from bitnet_mlx.backends.kernels.source import Platform
from bitnet_mlx.errors import ConfigError

LAYOUTS: dict[Platform, Layout] = {"cuda": Layout("bytes")}  # the activations' layout on each platform


def variants(n: int, k: int, m: int, platform: Platform) -> Sequence[MmaVariant]:
    """The forms worth trying for M rows times a weight [N, K], the likely best first. Every one is exact."""
    return mma.variants(n, k, m) if platform == "cuda" else []


def matmul(
    x: Any,
    w: Any,
    scale: Any,
    bias: Any | None = None,
    residual: Any | None = None,
    *,
    layout: Layout,
    variant: MmaVariant,
    dtype: str,
) -> Launch:
    """y [M, N] of `dtype` = (acc / s) * scale (+ bias) (+ residual), acc the exact integer product; any M.

    x uint32 [M, layout.stride(K)], rows in `layout`, "bytes" on CUDA; w uint32 [N, padded K / 16]; scale float32 [] or
    [1], [N], or [N, padded K / 128]; bias float32 [N]; residual [M, N] of `dtype`.
    Raises ConfigError where the layout is not the variant's.
    """
    if layout.kind == "bytes" and isinstance(variant, MmaVariant):
        return mma.mma_matmul(x, w, scale, bias, residual, variant=variant, dtype=dtype)
    raise ConfigError(
        f"[matmul] activations in layout {layout.kind!r} and {variant} were given; "
        "bytes with an MmaVariant are allowed: take both from one platform's LAYOUTS and variants"
    )
