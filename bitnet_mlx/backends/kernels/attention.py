"""Launches of a decode step's attention: one kernel, or where the context is long one over shares of it and their merger."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bitnet_mlx.backends.kernels.launch import Launch
from bitnet_mlx.backends.kernels.source import KernelSource
from bitnet_mlx.errors import BackendError

SOURCE = KernelSource(
    name="decode_attention",
    body="decode_attention.metal",
    headers=("common.h", "packed.h", "attention.h"),
    inputs=("qkv", "cosines", "sines", "past", "recent", "lengths"),
    outputs=("result", "kept"),
)
MERGE = KernelSource(
    name="decode_attention_merge",
    body="decode_attention_merge.metal",
    headers=("common.h", "attention.h"),
    inputs=("shares",),
    outputs=("result",),
)
WIDEST = 256  # D
_TINY = 256  # positions of `past` that are not worth shares
_SHORT = 512  # positions of `past` up to which one launch takes less time than two, the host's part included
_FEW = 128  # threadgroups that run at once on a large GPU, about
_MANY = 256  # threadgroups that such a GPU holds
_MOST_SHARES = 64
_SUMS = 512  # floats of one simdgroup in threadgroup memory: eight of them are 16 KiB
_REGISTERS = 32  # floats of a thread's sums
_MERGERS = 8  # simdgroups


@dataclass(frozen=True)
class Plan:
    """How a launch is cut up.

    queries: heads of queries that a threadgroup takes of those that share a head of keys. simdgroups: of a threadgroup.
    shares: parts of the positions, each with threadgroups of its own; 1: no second launch.
    """

    queries: int
    simdgroups: int
    shares: int


@dataclass(frozen=True)
class Row:
    """How the D values of a position lie among lanes. values: of one load. lanes: that share it. turns: loads of a lane."""

    values: int
    lanes: int
    turns: int

    @property
    def each(self) -> int:
        """Values of a lane."""
        return self.values * self.turns

    def ahead(self, queries: int) -> int:
        """Positions whose loads are on their way at once."""
        return 4 if queries * self.each <= _REGISTERS // 2 else 2


def row(dim: int, dtype: str) -> Row:
    """Loads of 16 bytes, or the most that divides a row of D values."""
    most = 4 if dtype == "float32" else 8
    values = next(v for v in (8, 4, 2, 1) if v <= most and dim % v == 0)
    pieces = dim // values
    lanes = next((n for n in (1, 2, 4, 8, 16, 32) if n >= pieces), 32)
    return Row(values, lanes, -(-pieces // lanes))


def plan(batch: int, heads: int, kv_heads: int, dim: int, room: int, slots: int, dtype: str) -> Plan:
    """The cut for `room` positions of past and `slots` of recent, by shapes alone.

    A short context takes a threadgroup for each head of queries: keys are read once for each of them, by parts of the GPU
    that would be idle. A long one is read once for as many heads as registers allow, in shares of as many positions as
    a threadgroup has on their way at once, but in no more threadgroups than a large GPU holds.
    """
    if room <= _SHORT and batch * heads <= _FEW:
        return Plan(1, 16, 1)
    at = row(dim, dtype)
    sharing = heads // kv_heads
    most = max(1, min(_REGISTERS // at.each, _SUMS // (at.each * at.lanes), sharing))
    groups = -(-sharing // most)
    queries = -(-sharing // groups)
    simdgroups = 8
    if room <= _TINY:
        return Plan(queries, simdgroups, 1)
    at_once = simdgroups * (32 // at.lanes) * at.ahead(queries)
    threadgroups = batch * kv_heads * groups
    return Plan(queries, simdgroups, max(1, min(-(-(room + slots) // at_once), _MANY // threadgroups, _MOST_SHARES)))


def possible(heads: int, kv_heads: int, dim: int) -> bool:
    """Whether the kernel takes these sizes."""
    return heads % kv_heads == 0 and dim % 2 == 0 and 4 <= dim <= WIDEST


def decode_attention(
    qkv: Any, cos: Any, sin: Any, past: Any, recent: Any, lengths: Any, *, heads: int, dtype: str, cut: Plan
) -> Launch:
    """One new token's rotary embedding, cache write and attention, as attention_mlx.decode_attention.

    qkv: [B, 1, (heads + 2 kv_heads) * D] of `dtype`. cos, sin: float32 [B or 1, 1, D / 2]. past, recent: [2, B, kv_heads,
    P or R, D] of `dtype`, which start at a multiple of 16 bytes. lengths: int32 [2].
    Outputs: out [B, 1, heads * D] of `dtype`, or with cut.shares above 1 what `merge` takes, float32 [B, heads, shares,
    D + 2]; and recent' as recent. Raises BackendError where the shapes do not fit each other.
    """
    batch, one, width = qkv.shape
    kv_heads, dim = past.shape[2], past.shape[4]
    slots = recent.shape[3]
    fits = (
        (one, width) == (1, (heads + 2 * kv_heads) * dim)
        and tuple(past.shape[:2]) == (2, batch)
        and tuple(recent.shape) == (2, batch, kv_heads, slots, dim)
        and tuple(cos.shape) in ((1, 1, dim // 2), (batch, 1, dim // 2))
        and cos.shape == sin.shape
        and tuple(lengths.shape) == (2,)
        and possible(heads, kv_heads, dim)
    )
    if not fits:
        shapes = ", ".join(str(tuple(a.shape)) for a in (qkv, cos, sin, past, recent, lengths))
        raise BackendError(
            f"[decode_attention] {heads} heads with arrays of {shapes}; qkv [B, 1, (heads + 2 kv_heads) * D], cos and sin "
            "[B or 1, 1, D / 2], past and recent [2, B, kv_heads, P or R, D], lengths [2], and an even D from 4 to 256 are "
            "allowed; use stock MLX for others"
        )
    at = row(dim, dtype)
    groups = -(-(heads // kv_heads) // cut.queries)
    split = cut.shares > 1
    result = ((batch, heads, cut.shares, dim + 2), "float32") if split else ((batch, 1, heads * dim), dtype)
    return Launch(
        source=SOURCE,
        inputs=(qkv, cos, sin, past, recent, lengths),
        template=(
            ("T", dtype), ("OUT", result[1]), ("DIM", dim), ("VALUES", at.values), ("LANES", at.lanes),
            ("QUERIES", cut.queries), ("SIMDGROUPS", cut.simdgroups), ("AHEAD", at.ahead(cut.queries)), ("SPLIT", split),
        ),
        grid=(32 * (cut.shares + 1), cut.simdgroups * groups * kv_heads, batch),
        threadgroup=(32, cut.simdgroups, 1),
        outputs=(result, (tuple(recent.shape), dtype)),
    )  # fmt: skip


def merge(shares: Any, dtype: str) -> Launch:
    """The shares of one attention put together: float32 [B, heads, shares, D + 2] -> [B, 1, heads * D] of `dtype`."""
    batch, heads, _, width = shares.shape
    dim = width - 2
    return Launch(
        source=MERGE,
        inputs=(shares,),
        template=(("T", dtype), ("DIM", dim)),
        grid=(32, _MERGERS * batch * heads, 1),
        threadgroup=(32, _MERGERS, 1),
        outputs=(((batch, 1, heads * dim), dtype),),
    )
