"""RMSNorm, alone and in one with the int8 quantiser that follows it."""

from __future__ import annotations

import numpy as np

from bitnet_mlx.backends.kernels.layout import Layout
from bitnet_mlx.backends.mlx_affine import Codes, StockOps, rms_factor
from bitnet_mlx.backends.mlx_import import mx
from bitnet_mlx.backends.resident_mlx import from_numpy
from bitnet_mlx.nn.watched import Watched


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """numpy_ref.rms_norm in float32, returned in the dtype of x. weight: float32 [K]. A GPU takes MLX's one kernel."""
    v = x.astype(mx.float32)
    if mx.default_device() == mx.gpu:
        return mx.fast.rms_norm(v, weight, eps).astype(x.dtype)
    return (v * rms_factor(v, eps) * weight).astype(x.dtype)


class RMSNorm(Watched):
    """weight: float32 [K]. Everything inside is float32; outputs have the dtype of x."""

    def __init__(self, weight: np.ndarray, eps: float, ops: StockOps | None = None) -> None:
        super().__init__()
        self.weight = from_numpy(np.asarray(weight, np.float32))
        self.eps = eps
        self.ops = ops or StockOps()
        mx.eval(self.weight)

    def __call__(self, x: mx.array) -> mx.array:
        """(x * r) * weight for x [..., K], r = 1 / sqrt(mean(x^2) + eps)."""
        if self.training and mx.default_device() == mx.gpu:
            # The weight in the dtype of x, as every other that is trained.
            return mx.fast.rms_norm(x, self.weight.astype(x.dtype), self.eps)
        return rms_norm(x, self.weight, self.eps)

    def quantize(self, x: mx.array, to: Layout | None = None) -> Codes:
        """Codes of the normed x, without computing it: several layers on the same input share them."""
        return self.ops.norm_quantize(x, self.weight, self.eps, to)

    def _extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
