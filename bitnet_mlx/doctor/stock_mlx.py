"""A product by stock MLX in float32, on MLX's default device."""

from __future__ import annotations

import numpy as np

from bitnet_mlx.ternary import TernaryTensor


class StockProduct:
    """x [M, K] float32 -> [M, N], quantised and multiplied."""

    def __init__(self, weight: TernaryTensor) -> None:
        from bitnet_mlx.backends.mlx_affine import StockOps
        from bitnet_mlx.backends.mlx_import import mx

        self._ops, self._array = StockOps(), mx.array
        self._scale = mx.array(weight.scale)
        self._words = self._ops.arrange(mx.array(weight.words), self._scale)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The outputs as numpy has them."""
        return np.array(self._ops.linear(self._ops.quantize(self._array(x)), self._words, self._scale))
