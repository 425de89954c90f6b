"""Low-rank adapters beside a frozen linear, packed or not: LoRA (Hu et al., 2021) and DoRA (Liu et al., 2024).

Parameters have mlx-lm's names and shapes: lora_a float32 [K, r], lora_b float32 [r, N], and DoRA's m float32 [N]. The
linear below keeps its packed words; its gradient with respect to x is its own (nn/gradient.py).
"""

from __future__ import annotations

import math
from typing import Any

from bitnet_mlx.backends.low_rank import LowRank
from bitnet_mlx.backends.mlx_import import mx, nn
from bitnet_mlx.backends.resident_mlx import from_numpy
from bitnet_mlx.nn.watched import Watched

_ROWS = 1024  # rows of W widened at a time


class LoRALinear(Watched):
    """y = linear(x) + scale * (x A) B. B starts at 0, so that a new adapter changes nothing."""

    def __init__(
        self, linear: nn.Module, n: int, k: int, r: int = 8, dropout: float = 0.0, scale: float = 20.0
    ) -> None:
        super().__init__()
        self.linear = linear
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        bound = 1 / math.sqrt(k)
        self.lora_a = mx.random.uniform(-bound, bound, (k, r))
        self.lora_b = mx.zeros((r, n))

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., K] -> [..., N] in the dtype of x; the adapter's part is computed in float32."""
        return self.linear(x) + self.beside(x).astype(x.dtype)

    def beside(self, x: mx.array) -> mx.array:
        """The adapter's part, float32 [..., N]."""
        return self.scale * ((self.dropout(x) @ self.lora_a) @ self.lora_b)


class DoRALinear(LoRALinear):
    """y = m / |W + scale * (A B)^T| * (x W^T + scale * (x A) B) + bias, |.| the norm of each row, a constant in gradients.

    The norm comes from |w + d|^2 = |w|^2 + 2 w d + |d|^2, so that neither W nor the sum is ever held whole.
    """

    def __init__(
        self, linear: nn.Module, n: int, k: int, r: int = 8, dropout: float = 0.0, scale: float = 20.0
    ) -> None:
        super().__init__(linear, n, k, r, dropout, scale)
        squares = [mx.square(rows).sum(axis=1) for rows in _blocks(linear, n)]
        self._squares = mx.concatenate(squares)
        self.m = mx.sqrt(self._squares)
        mx.eval(self._squares, self.m)

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., K] -> [..., N] in the dtype of x."""
        y = self.linear(x).astype(mx.float32)
        bias = self.linear.get("bias")
        y = (y if bias is None else y - bias) + self.beside(x)
        # A row of zeros that nothing was added to has norm 0 and m = 0; it stays 0.
        y = self.m / mx.maximum(mx.stop_gradient(self._norms()), 1e-12) * y
        return (y if bias is None else y + bias).astype(x.dtype)

    def _norms(self) -> mx.array:
        """float32 [N]: the norms of the rows of W + scale * (A B)^T."""
        a, b = self.lora_a, self.lora_b
        wa = mx.concatenate([rows @ a for rows in _blocks(self.linear, b.shape[1])])
        cross = (wa * b.T).sum(axis=1)
        own = (((a.T @ a) @ b) * b).sum(axis=0)
        return mx.sqrt(mx.maximum(self._squares + 2 * self.scale * cross + self.scale**2 * own, 0))


def beside(linear: nn.Module, part: LowRank) -> LoRALinear:
    """A frozen linear with a trained adapter's part."""
    kind = LoRALinear if part.m is None else DoRALinear
    layer = kind(linear, part.b.shape[1], part.a.shape[0], part.rank, 0.0, part.scale)
    layer.lora_a, layer.lora_b = from_numpy(part.a), from_numpy(part.b)
    if part.m is not None:
        layer.m = from_numpy(part.m)
    return layer


def _blocks(linear: Any, n: int) -> list[mx.array]:
    """The rows of W, float32, a block at a time."""
    return [linear.rows(mx.arange(at, min(at + _ROWS, n))).astype(mx.float32) for at in range(0, n, _ROWS)]
