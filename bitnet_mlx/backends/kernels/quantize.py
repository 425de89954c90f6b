"""Launches of the quantise kernel: a row of activations to int8 codes in a layout, a norm or a gate first where asked."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitnet_mlx.backends.kernels.launch import Launch, whole
from bitnet_mlx.backends.kernels.layout import LANES, TRITS_PER_WORD, Layout
from bitnet_mlx.backends.kernels.source import KernelSource
from bitnet_mlx.errors import BackendError
from bitnet_mlx.ternary import CODES_PER_WORD

SOURCE = KernelSource(
    name="quantize",
    body="quantize.metal",
    headers=("common.h", "gated.h", "packed.h", "quantize.h"),
    inputs=("x", "weight"),
    outputs=("codes",),
)
ACTS = {None: 0, "relu2": 1, "silu": 2}
# Simdgroups whose squares fit in 32 KB of threadgroup memory beside their biases: 14 of words of 16, 12 of 20.
# The smaller form leaves room for a second threadgroup on a core.
_FORMS = {CODES_PER_WORD: (7, 14), TRITS_PER_WORD: (7, 12)}
_PIECE = {CODES_PER_WORD: 8, TRITS_PER_WORD: 4}  # rows of multiples of these are read in pieces of 16 and 8 bytes
_MIN_VALUES = 8  # MLX puts smaller inputs in another address space


def quantize(
    x: Any,
    *,
    layout: Layout,
    dtype: str,
    norm: Any = None,
    eps: float = 0.0,
    act: str | None = None,
) -> Launch:
    """Codes, biases and scales of rows, to the bit those of numpy_ref and layout.prepare.

    x: [M, K] of `dtype` ("float32", "bfloat16", "float16"), or with act "relu2" or "silu" [M, 2 K], gate first, whose
    rows are numpy_ref.gated(gate, up). Where K is a multiple of 8, x starts at a multiple of 16 bytes. norm: float32
    [K], the weight of an RMSNorm in front with eps, as numpy_ref.norm_quantize.
    Output: uint32 [M, layout.stride(K)], rows of codes, biases and scale in `layout`.
    Raises BackendError for an unknown act, an empty x or one of fewer than 8 values, a norm of another width.
    """
    m, k = _sizes(x, norm, act)
    values = TRITS_PER_WORD if layout.kind == "trits" else CODES_PER_WORD
    owners = _owners(layout.width(k) // values, layout.words, _FORMS[values][-1])
    simdgroups = owners + (norm is not None)
    template = (
        ("T", dtype),
        ("ACT", ACTS[act]),
        ("NORM", norm is not None),
        ("EPS", int(np.float32(eps).view(np.int32))),
        ("LAYOUT", layout.index),
        ("W", layout.words),
        ("WHOLE", k % _PIECE[values] == 0),
        ("S", next(form for form in _FORMS[values] if form >= owners)),
    )
    return Launch(
        *SOURCE.given(x, norm),
        template=template,
        grid=(LANES * m, simdgroups, 1),
        threadgroup=(LANES, simdgroups, 1),
        outputs=(((m, layout.stride(k)), "uint32"),),
    )


def _sizes(x: Any, norm: Any, act: str | None) -> tuple[int, int]:
    """(M, K), checked."""
    if act not in ACTS:
        raise BackendError(f"[quantize] act is {act!r}; {', '.join(repr(name) for name in ACTS)} are allowed")
    m, width = x.shape
    k = width if act is None else width // 2
    if k < _MIN_VALUES or m < 1 or (act is not None and width % 2):
        raise BackendError(
            f"[quantize] x has shape {tuple(x.shape)}; the kernel takes one row or more of at least {_MIN_VALUES} "
            "values, with an activation function two halves of them; use stock MLX for others"
        )
    if norm is not None and tuple(norm.shape) != (k,):
        raise BackendError(f"[quantize] the norm's weight has shape {tuple(norm.shape)}; x of K = {k} needs ({k},)")
    return m, k


def _owners(words: int, step: int, most: int) -> int:
    """Simdgroups that share the words of a row evenly.

    Where they take turns each owns whole multiples of `step` lanes' words, so that a lane's bias stays one lane's.
    """
    needed = -(-words // LANES)
    if needed <= most:
        return needed
    turns = -(-needed // (most // step * step))
    return whole(-(-needed // turns), step)
