"""One row of activations quantised inside the ternary mat-vec, for CUDA: one launch instead of two, and the same bits.

Every block norms and quantises the whole row for itself while its weights are on their way. So a block is large, and
there are about as many blocks as the chip has multiprocessors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from bitnet_mlx.backends.kernels.launch import Launch, whole
from bitnet_mlx.backends.kernels.layout import LANES
from bitnet_mlx.backends.kernels.quantize import ACTS
from bitnet_mlx.backends.kernels.source import KernelSource
from bitnet_mlx.errors import BackendError
from bitnet_mlx.ternary import CODES_PER_WORD, padded

SOURCE = KernelSource(
    name="quantized_matvec",
    body="matvec_row.cu",
    headers=("common.h", "gated.h", "packed.h", "quantize.h", "quad.h"),
    inputs=("x", "weight", "w", "scale", "bias", "residual"),
    outputs=("y",),
    platforms=("cuda",),
)
_TRIED = 6
_PROCESSORS = 132  # of an H100; blocks are that many or a little less, or twice that
_WARPS = (4, 16)  # of a block
_FLIGHT = 40  # words of weights that a thread may hold
_QUADS = 8  # of values that a thread may hold
_SHARED = 48 << 10  # bytes of static shared memory
_QUAD_BYTES, _FEW_BYTES = 20, 256  # shared memory for four values: their squares and codes; for all the rest


@dataclass(frozen=True)
class FusedVariant:
    """lanes: for a row of the weight. rows: for those lanes. words: of one load. loads: in flight a row. warps: of a block."""

    lanes: int = 8
    rows: int = 1
    words: int = 4
    loads: int = 5
    warps: int = 8

    def quads(self, k: int, norm: bool) -> int:
        """Fours of values that a thread owns; with a norm the first warp owns none."""
        return -(-whole(padded(k) // 4, 64) // ((self.warps - norm) * LANES))


@lru_cache(maxsize=64)
def variants(n: int, k: int, norm: bool) -> tuple[FusedVariant, ...]:
    """The forms worth trying for a weight [N, K], the likely best first; none where a row is too wide."""
    words = padded(k) // CODES_PER_WORD
    scored = []
    for lanes, rows, width in ((a, r, v) for a in (8, 16, 32) for r in (1, 2, 4) for v in (4, 2)):
        steps = -(-words // (width * lanes))
        batches = -(-steps * rows * width // _FLIGHT)
        warps = _warps(-(-n * lanes // (rows * LANES)))
        form = FusedVariant(lanes, rows, width, -(-steps // batches), warps)
        while form.quads(k, norm) > _QUADS and form.warps < _WARPS[1]:
            form = FusedVariant(lanes, rows, width, form.loads, form.warps + 1)
        if possible(form, k, norm):
            scored.append((_badness(form, n, words, steps), len(scored), form))
    return tuple(form for _, _, form in sorted(scored)[:_TRIED])


def possible(form: FusedVariant, k: int, norm: bool) -> bool:
    """Whether a row of K fits into registers and shared memory."""
    if k < 8 or form.warps <= norm:
        return False
    quads = form.quads(k, norm)
    room = quads * (form.warps - norm) * LANES * _QUAD_BYTES + _FEW_BYTES
    return quads <= _QUADS and room <= _SHARED


def _warps(total: int) -> int:
    """Of a block, so that blocks with `total` warps together fill the chip evenly."""
    share = -(-total // _PROCESSORS)
    return max(_WARPS[0], -(-share // -(-share // _WARPS[1])))


def _badness(form: FusedVariant, n: int, words: int, steps: int) -> float:
    """A model, not measured: idle lanes, batches of loads, words in flight a processor, blocks that quantise one after another."""
    idle = 1 - words / (steps * form.words * form.lanes)
    batches = -(-steps // form.loads)
    blocks = n * form.lanes / (form.rows * form.warps * LANES)
    flight = min(blocks / _PROCESSORS, 2) * form.warps * LANES * form.rows * form.words * form.loads
    thin = max(0.0, math.log2(5000 / flight))
    crowd = max(0.0, blocks / _PROCESSORS - 1)
    threads = abs(math.log2(form.warps / 10))
    return idle + 0.4 * (batches - 1) + 0.3 * thin + 0.3 * crowd + 0.3 * threads + 0.15 / form.rows


def fused_matvec(
    x: Any,
    weight: Any | None,
    w: Any,
    scale: Any,
    bias: Any | None = None,
    residual: Any | None = None,
    *,
    variant: FusedVariant,
    dtype: str,
    eps: float = 0.0,
    act: str | None = None,
) -> Launch:
    """y [1, N] of `dtype` = linear(quantize(norm(act(x)))), to the bit that of quantize.quantize and dp4a.dp4a_matvec.

    x [1, K] of `dtype`, with act "relu2" or "silu" [1, 2 K], gate first; where K is a multiple of 8, x starts at a
    multiple of 16 bytes. weight float32 [K] of an RMSNorm with eps, or None. w uint32 [N, padded K / 16]; scale float32
    [] or [1] or [N]; bias float32 [N]; residual [1, N] of `dtype`.
    Raises BackendError for more rows, an unknown act, a scale for groups, and a row too wide for the variant.
    """
    n, k = w.shape[0], x.shape[1] // (1 if act is None else 2)
    norm = weight is not None
    if x.shape[0] != 1 or len(scale.shape) > 1 or act not in ACTS or not possible(variant, k, norm):
        raise BackendError(
            f"[fused] x {tuple(x.shape)}, scale {tuple(scale.shape)}, act {act!r} and {variant} were given; one row, a "
            f"scale for the tensor or each row, acts of {list(ACTS)} and {_QUADS} quads a thread are allowed; use the "
            "separate kernels for others"
        )
    in_block = variant.warps * LANES // variant.lanes * variant.rows
    template = (
        ("T", dtype),
        ("ACT", ACTS[act]),
        ("NORM", norm),
        ("EPS", int(np.float32(eps).view(np.int32))),
        ("WHOLE", k % 8 == 0),
        ("P", variant.quads(k, norm)),
        ("W", variant.warps),
        ("L", variant.lanes),
        ("R", variant.rows),
        ("V", variant.words),
        ("U", variant.loads),
        ("SCALES", int(len(scale.shape) == 1 and scale.shape[0] != 1)),
        ("BIAS", bias is not None),
        ("RESIDUAL", residual is not None),
    )
    return Launch(
        *SOURCE.given(x, weight, w, scale, bias, residual),
        template,
        (-(-n // in_block) * variant.warps * LANES, 1, 1),
        (variant.warps * LANES, 1, 1),
        (((1, n), dtype),),
    )
