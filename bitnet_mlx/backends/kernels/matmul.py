"""The ternary matrix product for many rows of activations: int8 tensor cores on CUDA, simdgroup matrices on Metal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bitnet_mlx.backends.kernels import mma, simd
from bitnet_mlx.backends.kernels.launch import Launch
from bitnet_mlx.backends.kernels.layout import Layout
from bitnet_mlx.backends.kernels.mma import MmaVariant
from bitnet_mlx.backends.kernels.simd import SimdVariant
from bitnet_mlx.backends.kernels.source import Platform
from bitnet_mlx.errors import ConfigError

LAYOUTS: dict[Platform, Layout] = {"metal": Layout("plain"), "cuda": Layout("bytes")}  # of each platform's activations


def variants(n: int, k: int, m: int, platform: Platform) -> Sequence[MmaVariant | SimdVariant]:
    """The forms worth trying for M rows times a weight [N, K], the likely best first. Every one is exact."""
    return mma.variants(n, k, m) if platform == "cuda" else simd.variants(n, k, m)


def matmul(
    xq: Any,
    xb: Any,
    s: Any,
    w: Any,
    scale: Any,
    bias: Any | None = None,
    residual: Any | None = None,
    *,
    layout: Layout,
    variant: MmaVariant | SimdVariant,
    dtype: str,
) -> Launch:
    """y [M, N] of `dtype` = (acc / s) * scale (+ bias) (+ residual), acc the exact integer product; any M.

    xq [M, padded K] and xb float32 [M, 1] in `layout`: int8 "bytes" on CUDA, float16 "plain" on Metal;
    s float32 [M]; w uint32 [N, padded K / 16]; scale float32 [] or [1], [N], or [N, padded K / 128], groups added in
    ascending order; bias float32 [N]; residual [M, N] of `dtype`. K up to 131,072.
    Raises ConfigError where the layout is not the variant's.
    """
    if layout.kind == "bytes" and isinstance(variant, MmaVariant):
        return mma.mma_matmul(xq, xb, s, w, scale, bias, residual, variant=variant, dtype=dtype)
    if layout.kind == "plain" and isinstance(variant, SimdVariant):
        return simd.simd_matmul(xq, xb, s, w, scale, bias, residual, variant=variant, dtype=dtype)
    raise ConfigError(
        f"[matmul] activations in layout {layout.kind!r} and {variant} were given; bytes with an MmaVariant or plain "
        "with a SimdVariant are allowed: take both from one platform's LAYOUTS and variants"
    )
