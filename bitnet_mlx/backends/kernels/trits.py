"""The ternary mat-vec from trits5 words, 1.6 bits a weight, for 1 to 8 rows of int8 activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bitnet_mlx.backends.kernels.launch import Launch, whole
from bitnet_mlx.backends.kernels.layout import LANES, TRITS_PER_WORD, Layout
from bitnet_mlx.backends.kernels.source import KernelSource
from bitnet_mlx.errors import ConfigError

TRITS = Layout("trits")
MOST_ROWS = 8
MOST_K = 65_536  # the widest K for which every partial sum stays a whole number of units below 2^24
SOURCE = KernelSource(
    name="ternary_matvec_trits",
    body="matvec_trits.metal",
    headers=("common.h", "epilogue.h", "trits5.h"),
    inputs=("x", "w", "scale", "bias", "residual"),
    outputs=("y",),
)


@dataclass(frozen=True)
class TritsVariant:
    """rows: of the weight, read together by a simdgroup. simdgroups: of a threadgroup."""

    rows: int = 4
    simdgroups: int = 2

    def fit(self, m: int) -> TritsVariant:
        """This variant for m rows of activations: as many rows of the weight as a simdgroup can finish."""
        rows = self.rows
        while rows * m > LANES:
            rows //= 2
        return TritsVariant(rows, self.simdgroups)


def variants(n: int, k: int, m: int) -> list[TritsVariant]:
    """The forms worth trying for a weight [N, K] and m rows of activations, the likely best first. All are exact.

    More rows share the loads of activations; fewer rows make more simdgroups of a small weight.
    """
    order = (4, 8, 2, 1) if n * k >= 1 << 22 else (4, 2, 1, 8)
    rows = [r for r in order if r * m <= LANES and (m == 1 or r <= 4)]  # decoded digits fill registers
    return [TritsVariant(r, g) for r in rows for g in (2, 8)]


def trits_matvec(
    x: Any,
    w: Any,
    scale: Any,
    bias: Any | None = None,
    residual: Any | None = None,
    *,
    variant: TritsVariant,
    dtype: str,
    layout: Layout = TRITS,
) -> Launch:
    """y [M, N] of `dtype` = (acc / s) * scale (+ bias) (+ residual), acc the exact integer product; M from 1 to 8.

    x uint32 [M, layout.stride(K)], rows of layout "trits"; w uint32 [N, W], W = ceil(K / 20);
    scale float32 [] or [1], or [N]; bias float32 [N]; residual [M, N] of `dtype`.
    Raises ConfigError for another M, another layout, scales in groups (128 is no multiple of 20), or K above 65,536.
    """
    m, (n, words) = x.shape[0], w.shape
    if not 1 <= m <= MOST_ROWS:
        raise ConfigError(f"[trits] {m} rows of activations were given; 1 to {MOST_ROWS} are allowed")
    if layout != TRITS or x.shape[1] != TRITS.stride(words * TRITS_PER_WORD):
        raise ConfigError(
            f"[trits] activations {tuple(x.shape)} in layout {layout.kind} were given; "
            f'[M, {TRITS.stride(words * TRITS_PER_WORD)}] in layout "trits" is what these words need'
        )
    if len(scale.shape) == 2:
        raise ConfigError(
            "[trits] scales in groups of 128 were given; a group is no whole number of trits5 words: keep words2"
        )
    if words * TRITS_PER_WORD > whole(MOST_K, TRITS_PER_WORD):
        raise ConfigError(f"[trits] rows of {words * TRITS_PER_WORD} weights were given; exact up to {MOST_K}")
    variant = variant.fit(m)
    if len(scale.shape) == 0:
        scale = scale.reshape(1)  # kernels index it
    return Launch(
        *SOURCE.given(x, w, scale, bias, residual),
        (
            ("T", dtype),
            ("M", m),
            ("R", variant.rows),
            ("SCALES", int(len(scale.shape) == 1 and n > 1 and scale.shape[0] == n)),
            ("BIAS", bias is not None),
            ("RESIDUAL", residual is not None),
        ),
        (LANES, whole(-(-n // variant.rows), variant.simdgroups), 1),
        (LANES, variant.simdgroups, 1),
        (((m, n), dtype),),
    )
