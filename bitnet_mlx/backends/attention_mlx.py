"""The rotary embedding and the attention of a decode step by stock MLX, in shapes that do not change from token to token."""

from __future__ import annotations

from bitnet_mlx.backends.mlx_import import mx

RECENT = 64  # slots of the newest positions, which are written anew with every token


def rope_kv(
    qkv: mx.array, cos: mx.array, sin: mx.array, heads: int, kv_heads: int, training: bool = False
) -> tuple[mx.array, mx.array]:
    """numpy_ref.rope of queries and keys, in float32, rounded to the dtype of qkv.

    qkv: [B, L, (heads + 2 kv_heads) * D]: queries, keys, values. cos, sin: float32 [B or 1, L, D / 2].
    Returns q [B, heads, L, D] and kv [2, B, kv_heads, L, D]: rotated keys, then values. training: the same bits in a form
    whose halves and whose gradients are one kernel where they are compiled, for one more operation.
    """
    b, length, width = qkv.shape
    dim = width // (heads + 2 * kv_heads)
    x = qkv.reshape(b, length, -1, dim).transpose(0, 2, 1, 3)
    first, second = mx.split(x[:, : heads + kv_heads].astype(mx.float32), 2, axis=-1)
    c, s = cos[:, None], sin[:, None]
    left = c * first + mx.contiguous(-s) * second if training else c * first - s * second
    rotated = mx.concatenate([left, c * second + s * first], axis=-1).astype(qkv.dtype)
    return rotated[:, :heads], mx.stack([rotated[:, heads:], x[:, heads + kv_heads :]])


def decode_attention(
    qkv: mx.array,
    cos: mx.array,
    sin: mx.array,
    past: mx.array,
    recent: mx.array,
    lengths: mx.array,
    heads: int,
    kv_heads: int,
) -> tuple[mx.array, mx.array]:
    """One new token's rotary embedding, cache write and attention; nothing here depends on a value, so it compiles.

    qkv: [B, 1, (heads + 2 kv_heads) * D] of T: queries, keys, values. cos, sin: float32 [B or 1, 1, D / 2].
    past: [2, B, kv_heads, P, D] of T, rotated keys and then values, of which the first lengths[0] positions count.
    recent: [2, B, kv_heads, R, D] of T, the positions after those; the first lengths[1] slots count, lengths[1] < R.
    lengths: int32 [2], for all sequences. What does not count may hold anything, NaN included.
    Returns (out, recent'): out [B, 1, heads * D] of T, softmax(q k^T / sqrt(D)) v over all that counts and the new token
    (Vaswani et al. 2017, equation 1; query head h reads key-value head h div (heads / kv_heads)), computed in float32
    from queries and keys that are rounded to T after rotation; recent', recent with the new token in slot lengths[1]
    and zeros after it.
    """
    q, new = rope_kv(qkv, cos, sin, heads, kv_heads)
    slot = mx.arange(recent.shape[3])[:, None]
    recent = mx.where(slot < lengths[1], recent, mx.where(slot == lengths[1], new, 0))
    seen = mx.concatenate([mx.arange(past.shape[3]) < lengths[0], mx.arange(recent.shape[3]) <= lengths[1]])
    past = mx.where(seen[: past.shape[3], None], past, 0)  # a weight of 0 does not silence a NaN
    keys, values = mx.concatenate([past, recent], axis=3).astype(mx.float32)
    b, _, _, dim = q.shape
    # In float32, since MLX's plain attention, its only one on a CPU, rounds scores to the dtype of the queries.
    out = mx.fast.scaled_dot_product_attention(q.astype(mx.float32), keys, values, scale=dim**-0.5, mask=seen)
    return out.transpose(0, 2, 1, 3).reshape(b, 1, heads * dim).astype(qkv.dtype), recent
