"""Quantisation-aware layers: master weights in float32, ternary weights and int8 activations in the forward pass.

The straight-through estimator: the forward pass sees w = t * m and x = q / s (formulas in bitnet_mlx/ternary.py),
the backward pass treats both quantisers as the identity. Products run in the activations' dtype.
"""

from __future__ import annotations

from typing import cast

import mlx.core as mx
import mlx.nn as nn

from bitnet_mlx.ternary import MIN_SCALE

_MIN = float(MIN_SCALE)


def ternary_parts(w: mx.array) -> tuple[mx.array, mx.array]:
    """float32 weight of any shape -> (t float32 of the same shape in -1, 0, 1; m float32 [])."""
    m = mx.maximum(mx.mean(mx.abs(w)), _MIN)
    return mx.clip(mx.round(w * (1.0 / m)), -1, 1), m


def activation_parts(x: mx.array) -> tuple[mx.array, mx.array]:
    """x [..., K] -> (q float32 [..., K] of integers, s float32 [..., 1]); half to even, in float32 whatever x is."""
    # max and -min read x twice; max of |x| would write and read a third copy.
    top = mx.maximum(mx.max(x, axis=-1, keepdims=True), -mx.min(x, axis=-1, keepdims=True)).astype(mx.float32)
    s = 127.0 / mx.maximum(top, _MIN)
    return mx.clip(mx.round(x.astype(mx.float32) * s), -128, 127), s


@mx.custom_function
def _quantize_input(x: mx.array) -> mx.array:
    q, s = activation_parts(x)
    return (q / s).astype(x.dtype)


@mx.custom_function
def _quantize_weight(w: mx.array) -> mx.array:
    t, m = ternary_parts(w)
    return t * m


def _pass_gradient(_primals: mx.array, cotangent: mx.array, _output: mx.array) -> mx.array:
    return cotangent


_quantize_input.vjp(_pass_gradient)
_quantize_weight.vjp(_pass_gradient)


def quantize_input(x: mx.array) -> mx.array:
    """x [..., K] -> q / s, in x's dtype. The gradient passes unchanged."""
    return cast(mx.array, _quantize_input(x))


def quantize_weight(w: mx.array) -> mx.array:
    """W -> t * m, float32. The gradient passes unchanged."""
    return cast(mx.array, _quantize_weight(w))


class QATLinear(nn.Module):
    """A linear layer without bias whose weight [N, K] is ternarised in the forward pass.

    The input must have gone through `quantize_input` already, since several layers share it.
    With quantise=False it is a plain linear layer: the float twin.
    """

    def __init__(self, n: int, k: int, std: float, quantise: bool = True) -> None:
        super().__init__()
        self.weight = mx.random.normal((n, k), scale=std)
        self.quantise = quantise

    def __call__(self, x: mx.array) -> mx.array:
        w = quantize_weight(self.weight) if self.quantise else self.weight
        return x @ w.astype(x.dtype).T


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
