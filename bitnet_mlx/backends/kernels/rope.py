"""Launches of the RoPE kernel: the fused product of queries, keys and values in, rotated heads and new cache rows out."""

from __future__ import annotations

from typing import Any

from bitnet_mlx.backends.kernels.launch import Launch, whole
from bitnet_mlx.backends.kernels.source import KernelSource
from bitnet_mlx.errors import BackendError

SOURCE = KernelSource(
    name="rope_kv",
    body="rope_kv.metal",
    headers=("common.h",),
    inputs=("qkv", "cosines", "sines"),
    outputs=("q", "kv"),
)
_THREADS = 256


def rope_kv(qkv: Any, cos: Any, sin: Any, *, heads: int, kv_heads: int, dtype: str) -> Launch:
    """Heads apart, queries and keys rotated by numpy_ref.rope in float32 and rounded once to `dtype`, values copied.

    qkv: [B, L, (heads + 2 kv_heads) * D] of `dtype`: queries, keys, values. cos, sin: float32 [B or 1, L, D / 2].
    Outputs: q [B, heads, L, D] and kv [2, B, kv_heads, L, D], rotated keys, then values.
    Raises BackendError where the shapes do not fit each other.
    """
    batch, length, width = qkv.shape
    pairs = cos.shape[2]
    dim = 2 * pairs
    angles = ((1, length, pairs), (batch, length, pairs))
    if width != (heads + 2 * kv_heads) * dim or tuple(cos.shape) not in angles or cos.shape != sin.shape:
        raise BackendError(
            f"[rope_kv] qkv has shape {tuple(qkv.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}; {heads} heads "
            f"and {kv_heads} of keys and values need [B, L, {heads + 2 * kv_heads} * D] and twice [B or 1, L, D / 2]"
        )
    return Launch(
        source=SOURCE,
        inputs=(qkv, cos, sin),
        template=(("T", dtype), ("HEADS", heads)),
        grid=(whole(batch * length * (width // 2), _THREADS), 1, 1),
        threadgroup=(_THREADS, 1, 1),
        outputs=(((batch, heads, length, dim), dtype), ((2, batch, kv_heads, length, dim), dtype)),
    )
