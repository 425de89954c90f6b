"""The ternary mat-vec for CUDA: int8 activations meet words2 codes in dp4a, four products an instruction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bitnet_mlx.backends.kernels.launch import Launch
from bitnet_mlx.backends.kernels.layout import Layout
from bitnet_mlx.backends.kernels.source import KernelSource
from bitnet_mlx.errors import ConfigError
from bitnet_mlx.ternary import CODES_PER_WORD, padded

BYTES = Layout("bytes")
MOST_ROWS = 8
_LANES = 32
SOURCE = KernelSource(
    name="ternary_matvec_dp4a",
    body="matvec_dp4a.cu",
    headers=(),
    inputs=("xq", "xb", "s", "w", "scale", "bias", "residual"),
    outputs=("y",),
    platforms=("cuda",),
    compat=False,
)


@dataclass(frozen=True)
class Dp4aVariant:
    """rows: weight rows of a warp. words: of one load. loads: in flight for each row. split: warps along K. warps: of a block."""

    rows: int = 2
    words: int = 1
    loads: int = 5
    split: int = 1
    warps: int = 4


def variants(n: int, k: int, m: int) -> list[Dp4aVariant]:
    """The forms worth trying for a weight [N, K] and M rows, the likely best first. Every one is exact."""
    found = []
    words = padded(k) // CODES_PER_WORD
    for split, rows, width in ((s, r, v) for s in (1, 2, 4) for r in (2, 4, 1, 8) for v in (1, 2, 4)):
        steps = -(-words // (width * _LANES * split))  # loads of a lane
        for loads in sorted({min(steps, 4), min(-(-steps // 2), 8), min(steps, 8)}):
            if rows * m <= _LANES and loads * rows * width <= 40 and (split == 1 or steps > 1):
                found += [Dp4aVariant(rows, width, loads, split, warps) for warps in (4, 8)]
    return found


def dp4a_matvec(
    xq: Any,
    xb: Any,
    s: Any,
    w: Any,
    scale: Any,
    bias: Any | None = None,
    residual: Any | None = None,
    *,
    variant: Dp4aVariant,
    dtype: str,
) -> Launch:
    """y [M, N] of `dtype` = (acc / s) * scale (+ bias) (+ residual), acc the exact integer product; M from 1 to 8.

    xq int8 [M, padded K] and xb float32 [M, 1] in layout "bytes"; s float32 [M]; w uint32 [N, padded K / 16];
    scale float32 [] or [1], [N], or [N, padded K / 128]; bias float32 [N]; residual [M, N] of `dtype`.
    Raises ConfigError for another M.
    """
    m, n = xq.shape[0], w.shape[0]
    if not 1 <= m <= MOST_ROWS:
        raise ConfigError(f"[dp4a] {m} rows of activations were given; 1 to {MOST_ROWS} are allowed")
    grouped = len(scale.shape) == 2
    if grouped:
        variant = Dp4aVariant(variant.rows, 1, min(variant.loads, 4), 1, variant.warps)
    if variant.rows * m > _LANES:
        variant = Dp4aVariant(_LANES // m, variant.words, variant.loads, variant.split, variant.warps)
    kind = 2 if grouped else int(len(scale.shape) == 1 and scale.shape[0] != 1)
    units = -(-n // variant.rows) * variant.split
    return Launch(
        SOURCE,
        (xq, xb, s, w, scale, scale if bias is None else bias, scale if residual is None else residual),
        (
            ("T", dtype),
            ("M", m),
            ("R", variant.rows),
            ("V", variant.words),
            ("U", variant.loads),
            ("SPLIT", variant.split),
            ("SCALES", kind),
            ("BIAS", bias is not None),
            ("RESIDUAL", residual is not None),
        ),
        (-(-units // variant.warps) * variant.warps * _LANES, 1, 1),
        (variant.warps * _LANES, 1, 1),
        (((m, n), dtype),),
    )
