"""RMSNorm of each head of queries and keys, between their projection and the rotary embedding (Qwen3's q_norm, k_norm)."""

from __future__ import annotations

from bitnet_mlx.backends.mlx_import import mx, nn
from bitnet_mlx.nn.site import ModuleSite, PackedSite


class HeadNorms:
    """A place of q, k and v whose queries and keys are normed, head by head, in float32."""

    def __init__(
        self, inner: PackedSite | ModuleSite, q_norm: nn.Module, k_norm: nn.Module, heads: int, kv_heads: int
    ) -> None:
        self.inner, self.q_norm, self.k_norm = inner, q_norm, k_norm
        self.heads, self.kv_heads = heads, kv_heads

    def __call__(self, x: mx.array) -> mx.array:
        """x [B, L, H] -> [B, L, (heads + 2 kv_heads) * D]: normed queries, normed keys, values, in the dtype of x."""
        qkv = self.inner(x)
        b, length, width = qkv.shape
        parts = qkv.reshape(b, length, self.heads + 2 * self.kv_heads, -1)
        q, k, v = mx.split(parts, [self.heads, self.heads + self.kv_heads], axis=2)
        return mx.concatenate([self.q_norm(q), self.k_norm(k), v], axis=2).reshape(b, length, width)
