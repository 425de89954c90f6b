"""The ternary mat-vec for CUDA: int8 activations meet words2 codes in dp4a, four products an instruction."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from bitnet_mlx.backends.kernels.launch import Launch, Value, whole
from bitnet_mlx.backends.kernels.layout import LANES, Layout
from bitnet_mlx.backends.kernels.source import KernelSource
from bitnet_mlx.errors import ConfigError
from bitnet_mlx.ternary import CODES_PER_WORD, padded

BYTES = Layout("bytes")
MOST_ROWS = 8
_INPUTS = ("x", "w", "scale", "bias", "residual")
SOURCE = KernelSource("ternary_matvec_dp4a", "matvec_dp4a.cu", (), _INPUTS, ("y",), ("cuda",), compat=False)
GROUPS = replace(SOURCE, name="ternary_matvec_dp4a_groups", body="matvec_dp4a_groups.cu")
_TRIED = 6
_WARPS = 5000  # of a launch: about what an H100 ran fastest with at every shape measured


@dataclass(frozen=True)
class Dp4aVariant:
    """rows: of the weight, for a warp. words: of one load. loads: in flight a row. split: warps along K. warps: of a block."""

    rows: int = 2
    words: int = 2
    loads: int = 3
    split: int = 1
    warps: int = 4

    def fit(self, m: int) -> Dp4aVariant:
        """The nearest form for m rows of activations: a lane finishes one output, and registers hold all sums."""
        return replace(self, rows=min(self.rows, 1 << (LANES // m).bit_length() - 1))


def variants(n: int, k: int, m: int) -> list[Dp4aVariant]:
    """The forms worth trying for a weight [N, K] and M rows, the likely best first. Every one is exact."""
    words = padded(k) // CODES_PER_WORD
    scored = []
    for split, rows, width in ((s, r, v) for s in (1, 2, 4, 8) for r in (1, 2, 4, 8) for v in (1, 2, 4)):
        steps = -(-words // (width * LANES * split))  # loads of a lane
        form = Dp4aVariant(rows, width, min(steps, 8), split, max(4, split))
        enough = split == 1 or -(-words // (width * LANES)) >= split
        if enough and rows * m <= LANES and rows * width * form.loads <= 40:
            scored.append((_badness(form, n, words, steps), len(scored), form))
    return [form for _, _, form in sorted(scored)[:_TRIED]]


def _badness(form: Dp4aVariant, n: int, words: int, steps: int) -> float:
    """How far a form is from what ran fastest: the number of warps, idle lanes, and words in flight a lane."""
    warps = n / form.rows * form.split
    idle = 1 - words / (steps * form.words * LANES * form.split)
    flight = form.rows * form.words * form.loads
    width = {1: 0.3, 2: 0.0, 4: 0.2}[form.words]
    return abs(math.log2(warps / _WARPS)) + idle + width + 0.5 * (not 4 <= flight <= 16) + 0.1 * math.log2(form.split)


def dp4a_matvec(
    x: Any,
    w: Any,
    scale: Any,
    bias: Any | None = None,
    residual: Any | None = None,
    *,
    variant: Dp4aVariant,
    dtype: str,
) -> Launch:
    """y [M, N] of `dtype` = (acc / s) * scale (+ bias) (+ residual), acc the exact integer product; M from 1 to 8.

    x uint32 [M, layout.stride(K)], rows of layout "bytes"; w uint32 [N, padded K / 16]; scale float32 [] or [1], [N],
    or [N, padded K / 128], groups added in ascending order; bias float32 [N]; residual [M, N] of `dtype`.
    Raises ConfigError for another M.
    """
    m, n = x.shape[0], w.shape[0]
    if not 1 <= m <= MOST_ROWS:
        raise ConfigError(f"[dp4a] {m} rows of activations were given; 1 to {MOST_ROWS} are allowed")
    variant = variant.fit(m)
    common: tuple[tuple[str, Value], ...] = (
        ("T", dtype),
        ("M", m),
        ("R", variant.rows),
        ("BIAS", bias is not None),
        ("RESIDUAL", residual is not None),
    )
    if len(scale.shape) == 2:
        source, units = GROUPS, -(-n // variant.rows)
    else:
        source, units = SOURCE, -(-n // variant.rows) * variant.split
        kind = int(len(scale.shape) == 1 and scale.shape[0] != 1)
        common += (("V", variant.words), ("U", variant.loads), ("SPLIT", variant.split), ("SCALES", kind))
    return Launch(
        *source.given(x, w, scale, bias, residual),
        common,
        (whole(units, variant.warps) * LANES, 1, 1),
        (variant.warps * LANES, 1, 1),
        (((m, n), dtype),),
    )
