"""The gradient of a packed ternary product with respect to its activations; the packed weights are frozen.

Rounding to int8 has no useful derivative, so the gradient passes straight through it, as in training: y = x W^T + bias
with W = t * scale gives dL/dx = dL/dy W. W is widened a block of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bitnet_mlx.backends.mlx_affine import StockOps
from bitnet_mlx.backends.mlx_import import mx

_ROWS = 1024  # rows of W widened to float32 at a time: 28 MB at K = 6912


def straight_through(
    ops: StockOps, bits: int, x: mx.array, words: mx.array, scale: mx.array, bias: mx.array | None
) -> mx.array:
    """x [..., K] of any float dtype -> [..., N] in its dtype, with a gradient with respect to x.

    words: as `ops` arranges them. bits: 8 quantises x for each token, 16 does not.
    """

    def forward(x: mx.array, words: mx.array, scale: mx.array) -> mx.array:
        if bits == 16:
            return ops.float_linear(x, words, scale, bias)
        k = x.shape[-1]
        to = ops.target(words, scale, x.size // k, k)
        return ops.linear(ops.quantize(x, to), words, scale, bias)

    # The arrays are arguments, so that a compiled training step takes them as inputs and not as constants.
    return _differentiable(forward, ops)(x, words, scale)


def _differentiable(forward: Callable[..., mx.array], ops: StockOps) -> Callable[..., mx.array]:
    function: Any = mx.custom_function(forward)

    @function.vjp
    def vjp(primals: tuple[mx.array, ...], cotangent: mx.array, _output: mx.array) -> tuple[mx.array, ...]:
        x, words, scale = primals
        return input_gradient(ops, cotangent, words, scale, x), mx.zeros_like(words), mx.zeros_like(scale)

    return function


def input_gradient(ops: StockOps, gradient: mx.array, words: mx.array, scale: mx.array, x: mx.array) -> mx.array:
    """dL/dy [..., N] -> dL/dx in the shape and dtype of x, computed in float32."""
    k, n = x.shape[-1], gradient.shape[-1]
    g = gradient.astype(mx.float32).reshape(-1, n)
    total = mx.zeros((g.shape[0], k), mx.float32)
    for at in range(0, n, _ROWS):
        rows = mx.arange(at, min(at + _ROWS, n))
        total = total + g[:, at : at + _ROWS] @ ops.rows(words, scale, rows, k)
    return total.reshape(x.shape).astype(x.dtype)
