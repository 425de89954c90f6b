"""layout.prepare in plain MLX operations: what stands in where a quantise kernel is switched off."""

from __future__ import annotations

from bitnet_mlx.backends.kernels.layout import HALF_BIAS, HALF_SCALE, HALF_UNIT, LANES, Layout
from bitnet_mlx.backends.mlx_import import mx


def prepare_mlx(q: mx.array, s: mx.array, layout: Layout) -> mx.array:
    """Codes as whole numbers, float32 [M, K], and their scales [M] -> uint32 [M, layout.stride(K)].

    Equal to layout.prepare: every sum is a whole number below 2^24, so its order does not matter.
    """
    m, k = q.shape
    codes, biases = _codes(q, layout)
    rest = layout.stride(k) - layout.code_words(k) - layout.biases - 1
    tail = mx.concatenate([biases, s.reshape(m, 1), mx.zeros((m, rest), mx.float32)], axis=1)
    return mx.concatenate([codes.view(mx.uint32), tail.view(mx.uint32)], axis=1)


def scales_mlx(x: mx.array, layout: Layout, k: int) -> mx.array:
    """The scales float32 [..., 1] of rows uint32 [..., layout.stride(K)]."""
    at = layout.code_words(k) + layout.biases
    return x[..., at : at + 1].view(mx.float32)


def _codes(q: mx.array, layout: Layout) -> tuple[mx.array, mx.array]:
    m, k = q.shape
    x = mx.pad(q, [(0, 0), (0, layout.width(k) - k)])
    if layout.kind == "halves":
        return _halves(x, layout.words)
    total = x.sum(axis=1, keepdims=True)
    if layout.kind == "bytes":
        return x.reshape(m, -1, 4, 4).swapaxes(2, 3).reshape(m, -1).astype(mx.int8), total
    if layout.kind == "trits":
        x = x.reshape(m, -1, 2, 2, 5).transpose(0, 1, 3, 4, 2).reshape(m, -1)
    return x.astype(mx.float16), total


def _halves(x: mx.array, words_a_load: int) -> tuple[mx.array, mx.array]:
    m = x.shape[0]
    words = x.reshape(m, -1, 2, 8)  # word, half, p
    scaled = (words * mx.array(HALF_SCALE)).swapaxes(2, 3).reshape(m, -1)
    added = (words * mx.array(HALF_BIAS)).sum(axis=3)  # [M, word, half]
    turn = LANES * words_a_load  # words that the lanes take at once
    added = mx.pad(added, [(0, 0), (0, -added.shape[1] % turn), (0, 0)])
    bias = added.reshape(m, -1, LANES, words_a_load, 2).sum(axis=(1, 3)) * HALF_UNIT
    return scaled.astype(mx.float16), bias.reshape(m, -1)
