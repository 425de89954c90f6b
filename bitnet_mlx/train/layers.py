"""Layers of the trained graph: master weights in float32, ternarised in the forward pass (train/ste.py).

Products run in the activations' dtype.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from bitnet_mlx.train.ste import STANDARD, STE, absmean, activation_parts, quantize_weight


class QATLinear(nn.Module):
    """A linear layer without bias whose weight [N, K] is ternarised in the forward pass.

    The input must have gone through `quantize_input` already, since several layers share it. Without an estimator it is a
    plain linear layer: the float twin. A learnable scale is float32 [], its logarithm.
    """

    def __init__(self, n: int, k: int, std: float, ste: STE | None = STANDARD) -> None:
        super().__init__()
        self.weight = mx.random.normal((n, k), scale=std)
        if ste is not None and ste.learnable:
            self.log_scale = mx.log(absmean(self.weight))
        self._ste = ste

    def __call__(self, x: mx.array) -> mx.array:
        if self._ste is None:
            return x @ self.weight.astype(x.dtype).T
        return x @ quantize_weight(self.weight, self._ste, x.dtype, self.get("log_scale")).T


class FixedLinear(nn.Module):
    """A linear layer over weights that are ternary already: t [N, K] and its scale. For evaluation of a packed model.

    The accumulators are exact integers as long as the product runs in float32 (or bfloat16 with a float32 sum).
    """

    def __init__(self, t: mx.array, scale: mx.array) -> None:
        super().__init__()
        self.t = t
        self.scale = scale

    def __call__(self, x: mx.array) -> mx.array:
        # x arrives as q / s; dividing the integers again keeps the accumulators exact.
        q, s = activation_parts(x)
        y = (q @ self.t.T) / s * self.scale
        return y.astype(x.dtype)


class RMSNorm(nn.Module):
    """RMSNorm with a float32 weight, in the input's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = mx.ones((size,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self.weight.astype(x.dtype), self.eps)
