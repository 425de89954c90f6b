"""The reference: every operation of a decoder in plain numpy, with the order of each sum fixed.

Other exact backends repeat these operations and get the same bits. The rules, all in float32, no contraction:

  lane sum   32 lanes; lane l adds v[l], v[l + 32], ... in ascending order, starting from 0; then the lanes are halved,
             lane l += lane l + h for h = 16, 8, 4, 2, 1.
  dot        the lane sum of a * b, each product rounded first. For rows in groups of 64 columns a lane adds
             (w[l] * x[l] + w[l + 32] * x[l + 32]) * scale for each group, in ascending order.
  norm       r = 1 / sqrt(lane sum of x^2 / K + eps).
  adapter    x A and then its product with B are dots; y = gain * (x W^T + scale * (x A) B) + bias, in this order.
  softmax    e = exp(score - max), z = lane sum of e; the output is (sum over positions, ascending, of e * v) / z.
  exp        n = rint(x * log2 e), a degree-6 polynomial in x - n ln 2 (two constants), times 2^n.
"""

from __future__ import annotations

import numpy as np

from bitnet_mlx.backends.low_rank import LowRank
from bitnet_mlx.formats import words2
from bitnet_mlx.formats.dense import HEAD_GROUP, DenseRows, GroupedRows
from bitnet_mlx.ternary import GROUP, MIN_SCALE, TernaryTensor, matmul, quantize_activations, scale_output

LANES = 32
_F = np.float32
LOG2E = _F(1.4426950408889634)
LN2_HIGH = _F(0.693359375)  # 9 bits, so that n * LN2_HIGH is exact
LN2_LOW = _F(-2.12194440054690581e-4)
# exp(r) = 1 + r + r^2 * p(r) on |r| <= ln 2 / 2; Taylor to r^7 is within 1e-8 there.
EXP_POLYNOMIAL = tuple(_F(c) for c in (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2))
EXP_LOW, EXP_HIGH = _F(-87.0), _F(88.0)
_ROWS_AT_ONCE = 512  # rows unpacked to float32 at a time


def lane_sum(v: np.ndarray) -> np.ndarray:
    """Sum over the last axis in the fixed order: float32 [..., K] -> float32 [...]."""
    k = v.shape[-1]
    whole = -(-k // LANES) * LANES
    if whole != k:
        v = np.concatenate([v, np.zeros((*v.shape[:-1], whole - k), np.float32)], axis=-1)
    steps = v.reshape(*v.shape[:-1], whole // LANES, LANES)
    lanes = np.zeros((*v.shape[:-1], LANES), np.float32)
    for i in range(steps.shape[-2]):
        lanes += steps[..., i, :]
    half = LANES // 2
    while half:
        lanes = lanes[..., :half] + lanes[..., half : 2 * half]
        half //= 2
    return lanes[..., 0]


def exp(x: np.ndarray) -> np.ndarray:
    """e^x in float32 by basic operations alone, so that every machine gets the same bits; relative error below 2e-7."""
    x = np.minimum(np.maximum(x, EXP_LOW), EXP_HIGH)
    n = np.rint(x * LOG2E)
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    p = EXP_POLYNOMIAL[0]
    for c in EXP_POLYNOMIAL[1:]:
        p = p * r + c
    y = (p * (r * r) + r) + _F(1)
    return y * ((n.astype(np.int32) + np.int32(127)) << np.int32(23)).view(np.float32)


def accumulate(q: np.ndarray, w: TernaryTensor) -> np.ndarray:
    """Exact integer products. q: int8 [M, K]. Returns int32 [M, N], or [M, G, N] for a weight with G groups along K."""
    m, k = q.shape
    n = w.shape[0]
    x = q.astype(np.float32)
    if w.scale.ndim < 2:
        acc = np.empty((m, n), np.int32)
        for at in range(0, n, _ROWS_AT_ONCE):
            t = words2.unpack(w.words[at : at + _ROWS_AT_ONCE], k).astype(np.float32)
            acc[:, at : at + _ROWS_AT_ONCE] = matmul(x, t.T)  # integers below 2^24: exact in any order
        return acc
    grouped = np.empty((m, w.groups, n), np.int32)
    for g in range(w.groups):
        columns = slice(g * GROUP, min((g + 1) * GROUP, k))
        words = w.words[:, g * GROUP // 16 : (g + 1) * GROUP // 16]
        t = words2.unpack(words, columns.stop - columns.start).astype(np.float32)
        grouped[:, g] = matmul(x[:, columns], t.T)
    return grouped


def ternary_linear(x: np.ndarray, w: TernaryTensor, bias: np.ndarray | None = None) -> np.ndarray:
    """Quantise float32 x [M, K] per token, multiply exactly, scale: float32 [M, N]."""
    q, s = quantize_activations(x)
    return quantized_linear(q, s, w, bias)


def quantized_linear(q: np.ndarray, s: np.ndarray, w: TernaryTensor, bias: np.ndarray | None = None) -> np.ndarray:
    """int8 q [M, K] and its scales s [M] -> float32 [M, N] = (acc / s) * scale (+ bias)."""
    y = scale_output(accumulate(q, w), s, w.scale)
    return y if bias is None else y + bias


def dense_linear(
    x: np.ndarray, w: TernaryTensor | DenseRows | GroupedRows, bias: np.ndarray | None = None
) -> np.ndarray:
    """float32 x [M, K] times float rows, each output a dot in the fixed order: float32 [M, N]."""
    m, n = x.shape[0], w.shape[0]
    y = np.empty((m, n), np.float32)
    for at in range(0, n, _ROWS_AT_ONCE):
        part = slice(at, min(at + _ROWS_AT_ONCE, n))
        for i in range(m):
            if isinstance(w, GroupedRows):
                y[i, part] = _grouped_dots(x[i], w.codes[part], w.scales[part])
            else:
                y[i, part] = lane_sum(w.rows(part) * x[i])
    return y if bias is None else y + bias


def adapted(y: np.ndarray, x: np.ndarray, part: LowRank) -> np.ndarray:
    """A linear's outputs float32 [M, N], before its bias, with its adapter's part for the inputs x, float32 [M, K]."""
    low = dense_linear(x, DenseRows(part.a.T, "float32"))
    y = y + _F(part.scale) * dense_linear(low, DenseRows(part.b.T, "float32"))
    return y if part.gain is None else part.gain * y


def _grouped_dots(x: np.ndarray, codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """x [K] with int8 codes [N, K] and scales [N, G] -> float32 [N]."""
    n, k = codes.shape
    groups = scales.shape[1]
    products = np.zeros((n, groups * HEAD_GROUP), np.float32)
    products[:, :k] = codes.astype(np.float32) * x
    halves = products.reshape(n, groups, 2, LANES)
    return lane_sum(((halves[:, :, 0] + halves[:, :, 1]) * scales[..., None]).reshape(n, groups * LANES))


def rms_factor(x: np.ndarray, eps: float) -> np.ndarray:
    """r = 1 / sqrt(mean(x^2) + eps): float32 [..., K] -> float32 [...]."""
    return _F(1) / np.sqrt(lane_sum(x * x) / _F(x.shape[-1]) + _F(eps))


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """(x * r) * weight, float32 [..., K]."""
    return x * rms_factor(x, eps)[..., None] * weight


def norm_quantize(x: np.ndarray, weight: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """RMSNorm and int8 quantisation in one: float32 x [M, K] -> (q int8 [M, K], s float32 [M]).

    The factor r cancels in the codes: with p = x * weight and a = max|p|, q = rint(p * (127 / a)) and s = 127 / (a * r).
    A row so small that a * r < 1e-5 takes a = 1e-5 / r instead, which is the quantiser's own floor.
    """
    r = rms_factor(x, eps)
    p = x * weight
    a = np.abs(p).max(axis=-1)
    c = np.where(a * r >= MIN_SCALE, a, MIN_SCALE / r)
    q = np.clip(np.rint(p * (_F(127) / c)[:, None]), -128, 127).astype(np.int8)
    return q, _F(127) / (c * r)


def rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotate halves: x [M, heads, D], cos and sin [M, D / 2] -> the same shape as x."""
    a, b = np.split(x, 2, axis=-1)
    c, s = cos[:, None, :], sin[:, None, :]
    return np.concatenate([a * c - b * s, b * c + a * s], axis=-1)


def attend(q: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """One token's attention. q [heads, D]; keys, values [kv heads, T, D]; returns [heads, D].

    Query head h reads key-value head h div (heads / kv heads). Scores are dot * (1 / sqrt(D)).
    """
    heads, dim = q.shape
    kv = keys.shape[0]
    grouped = q.reshape(kv, heads // kv, 1, dim)
    scores = lane_sum(grouped * keys[:, None]) * _F(1 / np.sqrt(dim))  # [kv, heads / kv, T]
    e = exp(scores - scores.max(axis=-1, keepdims=True))
    total = np.zeros((kv, heads // kv, dim), np.float32)
    for t in range(keys.shape[1]):
        total += e[:, :, t, None] * values[:, None, t]
    return (total / lane_sum(e)[..., None]).reshape(heads, dim)


def gated(gate: np.ndarray, up: np.ndarray, act: str) -> np.ndarray:
    """relu2: max(gate, 0)^2 * up. silu: gate / (1 + e^-gate) * up."""
    if act == "relu2":
        positive = np.maximum(gate, _F(0))
        return positive * positive * up
    return gate / (_F(1) + exp(-gate)) * up
