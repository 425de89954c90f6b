"""The attention kernels' launches by numpy, for twin.py."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitnet_mlx.backends import numpy_ref
from bitnet_mlx.backends.kernels.launch import Launch
from bitnet_mlx.backends.kernels.problem import rounded


def attended(arrays: dict[str, np.ndarray], template: dict[str, Any], launch: Launch) -> list[np.ndarray]:
    """Outputs of decode_attention; in shares, the first has everything."""
    past, recent, dtype = arrays["past"], arrays["recent"].copy(), template["T"]
    (old, held), (kv_heads, dim) = arrays["lengths"], (past.shape[2], past.shape[4])
    b = past.shape[1]
    x = arrays["qkv"].astype(np.float32).reshape(b, -1, dim)
    heads = x.shape[1] - 2 * kv_heads
    cos, sin = (np.broadcast_to(arrays[name][:, 0], (b, dim // 2)) for name in ("cosines", "sines"))
    turned = rounded(numpy_ref.rope(x[:, : heads + kv_heads], cos, sin), dtype)
    recent[:, :, :, held] = turned[:, heads:], x[:, heads + kv_heads :]
    recent[:, :, :, held + 1 :] = 0
    out = np.empty((b, heads, dim), np.float32)
    for i in range(b):
        keys, values = (
            np.concatenate([p[i, :, :old], r[i, :, : held + 1]], axis=1) for p, r in zip(past, recent, strict=True)
        )
        out[i] = numpy_ref.attend(turned[i, :heads], keys.astype(np.float32), values.astype(np.float32))
    if not template["SPLIT"]:
        return [rounded(out.reshape(b, 1, -1), dtype), recent]
    shares = np.zeros(launch.outputs[0][0], np.float32)
    shares[:, :, 0, :dim], shares[:, :, 0, dim + 1], shares[:, :, 1:, dim] = out, 1, -1e38
    return [shares, recent]


def merged(shares: np.ndarray, dtype: str) -> np.ndarray:
    """The output of decode_attention_merge."""
    b, heads, _, width = shares.shape
    values, top, weight = np.split(shares.astype(np.float64), [width - 2, width - 1], axis=-1)
    factor = np.exp2(top - top.max(axis=2, keepdims=True))
    out = (factor * values).sum(axis=2) / (factor * weight).sum(axis=2)
    return rounded(out.astype(np.float32).reshape(b, 1, heads * (width - 2)), dtype)
