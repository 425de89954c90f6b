"""The ternary matrix product for Metal, in simdgroup matrices: for prefill and batches."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from bitnet_mlx.backends.kernels.launch import Launch
from bitnet_mlx.backends.kernels.source import KernelSource

_LANES = 32
_SIDE = 8  # of a simdgroup matrix
SOURCE = KernelSource(
    name="ternary_matmul_simd",
    body="matmul.metal",
    headers=("common.h", "epilogue.h", "words.h", "half_mantissa.h", "ternary_half.h"),
    inputs=("xq", "xb", "s", "w", "scale", "bias", "residual"),
    outputs=("y",),
    platforms=("metal",),
)


@dataclass(frozen=True)
class SimdVariant:
    """rows, columns: matrices of 8 by 8 that a simdgroup keeps, along M and N. simdgroups: of a threadgroup, along N."""

    rows: int = 4
    columns: int = 4
    simdgroups: int = 4

    @property
    def tile(self) -> tuple[int, int]:
        """Outputs of a threadgroup: rows of activations, rows of the weight."""
        return self.rows * _SIDE, self.columns * self.simdgroups * _SIDE


_FORMS = [
    SimdVariant(r, c, g) for r, c, g in ((4, 4, 4), (8, 2, 4), (4, 2, 4), (8, 4, 4), (2, 4, 4), (2, 2, 4), (4, 2, 8))
]


@lru_cache(maxsize=256)
def variants(n: int, k: int, m: int) -> list[SimdVariant]:
    """The forms worth trying for M rows times a weight [N, K], the likely best first. Every one is exact."""
    del k

    def wasted(form: SimdVariant) -> int:
        tile_m, tile_n = form.tile
        return math.ceil(m / tile_m) * tile_m * math.ceil(n / tile_n) * tile_n

    return sorted((form for form in _FORMS if form.tile[0] < m + 16), key=wasted)


def simd_matmul(
    xq: Any, xb: Any, s: Any, w: Any, scale: Any, bias: Any, residual: Any, *, variant: SimdVariant, dtype: str
) -> Launch:
    """What `matmul.matmul` says, for layout "plain"."""
    m, n = xq.shape[0], w.shape[0]
    kind = 2 if len(scale.shape) == 2 else int(len(scale.shape) == 1 and scale.shape[0] != 1)
    if kind == 2:  # each sum has a float32 beside it
        variant = replace(variant, rows=min(variant.rows, 4), columns=min(variant.columns, 2))
    if len(scale.shape) == 0:
        scale = scale.reshape(1)  # the kernel indexes it; MLX passes a scalar by reference
    tile_m, tile_n = variant.tile
    return Launch(
        SOURCE,
        (xq, xb, s, w, scale, scale if bias is None else bias, scale if residual is None else residual),
        (
            ("T", dtype),
            ("MT", variant.rows),
            ("NT", variant.columns),
            ("SG", variant.simdgroups),
            ("SCALES", kind),
            ("BIAS", bias is not None),
            ("RESIDUAL", residual is not None),
        ),
        (_LANES * math.ceil(n / tile_n), variant.simdgroups * math.ceil(m / tile_m), 1),
        (_LANES, variant.simdgroups, 1),
        (((m, n), dtype),),
    )
