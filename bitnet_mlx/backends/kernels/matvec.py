"""The ternary mat-vec: 1 to 8 rows of activations, in half-mantissa form (int8 codes) or in floating point (16 bits)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bitnet_mlx.backends.kernels.launch import Launch, Value, whole
from bitnet_mlx.backends.kernels.layout import HALF_LIMIT, LANES, Layout, halves
from bitnet_mlx.backends.kernels.source import KernelSource
from bitnet_mlx.errors import ConfigError
from bitnet_mlx.ternary import CODES_PER_WORD, GROUP

MOST_ROWS = 8
MOST_OUTPUTS = 32  # rows of activations times rows of weights of a simdgroup: each lane finishes one output
_FLOAT_OUTPUTS = 16  # in floating point an output takes four registers of a lane
LANE_WORDS = HALF_LIMIT // CODES_PER_WORD // LANES  # 95: the most words of a row that one lane may sum without rounding

_COMMON = ("common.h", "epilogue.h", "words.h")
_QUANTISED = ("xq", "xb", "s", "w", "scale", "bias", "residual")
MATVEC = KernelSource("ternary_matvec", "matvec.metal", (*_COMMON, "half_mantissa.h"), _QUANTISED, ("y",))
GROUPS = KernelSource(
    "ternary_matvec_groups", "matvec_groups.metal", (*_COMMON, "half_mantissa.h", "group_rows.h"), _QUANTISED, ("y",)
)
FLOAT = KernelSource(
    "ternary_matvec_float",
    "matvec_float.metal",
    (*_COMMON, "code_places.h"),
    ("x", "w", "scale", "bias", "residual"),
    ("y",),
)


@dataclass(frozen=True)
class MatvecVariant:
    """rows: of the weight a simdgroup, 1, 2, 4 or 8. simdgroups: of a threadgroup, 1 to 32. Every choice is exact."""

    rows: int = 4
    simdgroups: int = 2

    def fit(self, m: int, outputs: int = MOST_OUTPUTS) -> MatvecVariant:
        """This variant for m rows of activations: no more rows of the weight than make that many outputs a simdgroup."""
        rows = self.rows
        while rows * m > outputs:
            rows //= 2
        return MatvecVariant(rows, self.simdgroups)


def variants(n: int, k: int, m: int) -> list[MatvecVariant]:
    """The forms worth trying for a weight [N, K] and m rows of activations, the likely best first.

    More rows share the loads of activations; fewer rows make more simdgroups of a small weight.
    """
    order = (4, 8, 2, 1) if n * k >= 1 << 22 else (4, 2, 1, 8)
    return [MatvecVariant(rows, groups) for rows in order for groups in (2, 8) if rows * m <= MOST_OUTPUTS]


def halves_of(words: np.ndarray) -> np.ndarray:
    """What half_mantissa.h's masks make of code words, in numpy: uint32 [...] -> float16 [..., 8, 2], (position p, half).

    halves_of(words)[..., p, h] * HALF_SCALE[p] = (t + HALF_BIAS[p]) * HALF_UNIT, t the weight of code p + 8 h.
    """
    m = words | 0xC000C000
    steps = [m & 0x40034003, m & 0x400C400C, m & 0x40304030, m & 0x40C040C0, m & 0x43004300]
    steps += [words & 0x0C000C00, (m - 0x50005000) & 0x90009000, (words ^ 0x40004000) & 0xC000C000]
    return np.stack(steps, axis=-1).astype("<u4").view("<f2").reshape(*words.shape, 8, 2)


def matvec(
    xq: Any,
    xb: Any,
    s: Any,
    w: Any,
    scale: Any,
    bias: Any | None = None,
    residual: Any | None = None,
    *,
    layout: Layout,
    variant: MatvecVariant,
    dtype: str,
) -> Launch:
    """y [M, N] of `dtype` = (acc / s) * scale (+ bias) (+ residual), acc the exact integer product; M from 1 to 8.

    xq float16 [M, padded K] and xb float32 [M, 64], of layout "halves"; s float32 [M]; w uint32 [N, padded K / 16];
    scale float32 [] or [1], [N], or [N, padded K / 128], groups added in ascending order; bias float32 [N];
    residual [M, N] of `dtype`. Raises ConfigError for another M or layout, and where a lane would sum too many words
    to be exact (K above 48,640, or a little less with several words a load).
    """
    m, n, words = _rows("matvec", xq), w.shape[0], w.shape[1]
    if layout.kind != "halves":
        raise ConfigError(f"[matvec] the activations are in layout {layout.kind!r}; halves is allowed")
    if -(-words // (layout.words * LANES)) * layout.words > LANE_WORDS:
        raise ConfigError(
            f"[matvec] K is {words * CODES_PER_WORD} with {layout.words} words a load; up to {HALF_LIMIT} with one "
            "word a load is exact; use the mlx backend for a wider weight"
        )
    kind, scale = _scales(scale)
    return _launch(
        GROUPS if kind == 2 else MATVEC,
        (xq, xb, s, w, scale),
        bias,
        residual,
        (m, n),
        layout.words,
        variant.fit(m),
        dtype,
        kind,
    )


def float_matvec(
    x: Any,
    w: Any,
    scale: Any,
    bias: Any | None = None,
    residual: Any | None = None,
    *,
    variant: MatvecVariant,
    dtype: str,
) -> Launch:
    """y [M, N] of `dtype` = (x . t) * scale (+ bias) (+ residual) for activations that are not quantised; M from 1 to 8.

    x [M, K] of `dtype`, K not padded; w uint32 [N, padded K / 16]; scale, bias and residual as in `matvec`. Sums are
    float32: within K * 2^-24 * sum|x| * scale of the exact product, and exact where x holds integers that sum below
    2^24. Raises ConfigError for another M.
    """
    m, n, k = _rows("float_matvec", x), w.shape[0], x.shape[1]
    kind, scale = _scales(scale)
    form, ragged = variant.fit(m, _FLOAT_OUTPUTS), (("RAGGED", k % GROUP != 0),)
    return _launch(FLOAT, (x, w, scale), bias, residual, (m, n), halves(k).words, form, dtype, kind, ragged)


def _rows(name: str, x: Any) -> int:
    m = x.shape[0]
    if not 1 <= m <= MOST_ROWS:
        raise ConfigError(
            f"[{name}] {m} rows of activations were given; 1 to {MOST_ROWS} are allowed; use matmul for more"
        )
    return m


def _scales(scale: Any) -> tuple[int, Any]:
    """(0 for the tensor, 1 for rows, 2 for groups; the scale with at least one dimension, as a kernel indexes it)."""
    dimensions = len(scale.shape)
    if dimensions == 0:
        return 0, scale.reshape(1)
    return (2 if dimensions == 2 else int(scale.shape[0] != 1)), scale


def _launch(
    source: KernelSource,
    inputs: tuple[Any, ...],
    bias: Any | None,
    residual: Any | None,
    shape: tuple[int, int],
    words: int,
    variant: MatvecVariant,
    dtype: str,
    scales: int,
    more: tuple[tuple[str, Value], ...] = (),
) -> Launch:
    m, n = shape
    scale = inputs[-1]  # stands for what is absent, and is not read there
    return Launch(
        source,
        (*inputs, scale if bias is None else bias, scale if residual is None else residual),
        (
            ("T", dtype),
            ("M", m),
            ("R", variant.rows),
            ("W", words),
            ("SCALES", scales),
            ("BIAS", bias is not None),
            ("RESIDUAL", residual is not None),
            *more,
        ),
        (LANES, whole(-(-n // variant.rows), variant.simdgroups), 1),
        (LANES, variant.simdgroups, 1),
        (((m, n), dtype),),
    )
