"""Exact ternary products by stock MLX, on any of its devices: quantized_matmul in float32 with scales 1 and biases -1.

A 2-bit code is t + 1, so with scale 1 and bias -1 MLX multiplies by t itself. Activations are int8 codes held in
float32; every partial sum is an integer below 2^24, so the result is the integer product. bfloat16 or float16
activations would not do: MLX's CPU code sums in their dtype. The weight's true scale is applied afterwards, in the
order of ternary.scale_output; inside the product it would change the last bits.

`StockOps` is what the layers call. Another backend offers the same methods and is handed to the layers in its place.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from bitnet_mlx.backends.attention_mlx import decode_attention, rope_kv
from bitnet_mlx.backends.kernels.layout import Layout
from bitnet_mlx.backends.mlx_import import mx
from bitnet_mlx.backends.numpy_ref import EXP_HIGH, EXP_LOW, EXP_POLYNOMIAL, LANES, LN2_HIGH, LN2_LOW, LOG2E
from bitnet_mlx.ternary import CODES_PER_WORD, GROUP, MIN_SCALE

_MIN_SCALE = float(MIN_SCALE)
_WORDS_PER_GROUP = GROUP // CODES_PER_WORD
# MLX 0.32.4 on CUDA cannot launch the float32 quantised product from 64 rows on.
_CUDA_ROWS = 32


class Codes(NamedTuple):
    """Quantised activations, x close to q / s.

    q: [..., K], whole numbers from -128 to 127 in float32, and s: float32 [..., 1]; or, where `layout` is given, q is
    uint32 [..., layout.stride(k)], rows that hold their scale too, and s is None. dtype: that of outputs. k: K.
    """

    q: mx.array
    s: mx.array | None
    dtype: mx.Dtype
    layout: Layout | None = None
    k: int | None = None

    @property
    def rows(self) -> int:
        """How many there are, over all leading dimensions."""
        return self.q.size // self.q.shape[-1]

    @property
    def scales(self) -> mx.array:
        """s of codes without a layout."""
        assert self.s is not None
        return self.s

    @property
    def columns(self) -> int:
        """K, whatever the layout."""
        return self.q.shape[-1] if self.k is None else self.k


class StockOps:
    """The operations of a packed ternary decoder on stock MLX.

    `to` is what `target` returned for the product that will read the codes; None, its only value here, means float32
    codes in their own order. compiles: whether the decoder may compile its parts of fixed shape (it pays where each
    call builds a kernel's text; on MLX's CPU device it would call a C++ compiler).
    """

    name = "mlx"
    compiles = False

    def prepare(self, shapes: Iterable[tuple[int, int, str]], dtype: str) -> None:
        """Called once for a model, when it is built. shapes: (N, K, "tensor", "row" or "group") of its products."""

    def target(self, words: mx.array, scale: mx.array, m: int, k: int) -> Layout | None:
        """The layout of codes that `linear` wants for m rows of K and these (arranged) words."""
        return None

    def arrange(self, words: mx.array, scale: mx.array) -> mx.array:
        """uint32 words [N, W] as `linear` reads them: as they are, or [G, N, 8] where each row has G scales along K."""
        if scale.ndim < 2:
            return words
        n, g = scale.shape
        return mx.contiguous(words.reshape(n, g, _WORDS_PER_GROUP).transpose(1, 0, 2))

    def restore(self, words: mx.array) -> mx.array:
        """The inverse of `arrange`: uint32 [N, W]."""
        return words if words.ndim == 2 else mx.contiguous(words.transpose(1, 0, 2).reshape(words.shape[1], -1))

    def quantize(self, x: mx.array, to: Layout | None = None) -> Codes:
        """Per-token int8 codes of x [..., K] of any float dtype."""
        return quantize(x)

    def norm_quantize(self, x: mx.array, weight: mx.array, eps: float, to: Layout | None = None) -> Codes:
        """RMSNorm with float32 weight [K], then int8 codes, as numpy_ref.norm_quantize."""
        return norm_quantize(x, weight, eps)

    def gated_quantize(
        self, gate_up: mx.array, act: str, weight: mx.array | None, eps: float, to: Layout | None = None
    ) -> Codes:
        """Codes of act(gate) * up, normed first where a float32 weight [F] is given. gate_up: [..., 2 F], gate first."""
        hidden = gated(gate_up, act)
        codes = quantize(hidden) if weight is None else norm_quantize(hidden, weight, eps)
        return codes._replace(dtype=gate_up.dtype)

    def linear(
        self,
        codes: Codes,
        words: mx.array,
        scale: mx.array,
        bias: mx.array | None = None,
        residual: mx.array | None = None,
    ) -> mx.array:
        """Codes [..., K] to outputs [..., N] in codes.dtype, T. words: as arranged. scale, bias: float32.

        With a residual [..., N] of T: T(float32(residual) + float32(T(y))).
        """
        y = scale_output(accumulate(codes.q, words), codes.scales, scale)
        return _finished(y, bias, residual, codes.dtype)

    def fused_linear(
        self,
        x: mx.array,
        words: mx.array,
        scale: mx.array,
        bias: mx.array | None = None,
        residual: mx.array | None = None,
        *,
        norm: mx.array | None = None,
        eps: float = 0.0,
        act: str = "",
    ) -> mx.array:
        """`linear` of the codes of x [..., K]; with an act of act(gate) * up, x [..., 2 K]; normed first where a weight
        float32 [K] is given. Outputs [..., N] in the dtype of x."""
        to = self.target(words, scale, x.size // x.shape[-1], x.shape[-1] // (2 if act else 1)) if x.size else None
        if act:
            codes = self.gated_quantize(x, act, norm, eps, to)
        else:
            codes = self.quantize(x, to) if norm is None else self.norm_quantize(x, norm, eps, to)
        return self.linear(codes, words, scale, bias, residual)

    def float_linear(
        self,
        x: mx.array,
        words: mx.array,
        scale: mx.array,
        bias: mx.array | None = None,
        residual: mx.array | None = None,
    ) -> mx.array:
        """The same for activations that are not quantised: x [..., K] of any float dtype, summed in float32.

        The ternary weights are exact; the sums round, to within K * 2^-24 of the sum of |x| times the scale.
        """
        y = accumulate(x.astype(mx.float32), words)
        if scale.ndim < 2:
            y = y * scale
        else:
            y = _add_groups([y[..., g, :] * scale[:, g] for g in range(scale.shape[1])])
        return _finished(y, bias, residual, x.dtype)

    def rope_kv(
        self, qkv: mx.array, cos: mx.array, sin: mx.array, heads: int, kv_heads: int
    ) -> tuple[mx.array, mx.array]:
        """Heads apart, queries and keys rotated: the function of the same name."""
        return rope_kv(qkv, cos, sin, heads, kv_heads)

    def attends(self, batch: int, heads: int, kv_heads: int, dim: int, room: int, dtype: mx.Dtype) -> bool:
        """Whether `decode_attention` pays for a past of `room` positions: stock MLX's copies all that the cache holds."""
        return False

    def decode_attention(
        self,
        qkv: mx.array,
        cos: mx.array,
        sin: mx.array,
        past: mx.array,
        recent: mx.array,
        lengths: mx.array,
        heads: int,
        kv_heads: int,
    ) -> tuple[mx.array, mx.array]:
        """One new token's rotary embedding, cache write and attention: the function of the same name."""
        return decode_attention(qkv, cos, sin, past, recent, lengths, heads, kv_heads)

    def rows(self, words: mx.array, scale: mx.array, index: mx.array, k: int) -> mx.array:
        """The chosen rows, scaled: float32 [*index.shape, K], as TernaryTensor.rows."""
        if words.ndim == 3:
            words = mx.moveaxis(words[:, index], 0, -2).reshape(*index.shape, -1)
        else:
            words = words[index]
        units = mx.ones((*words.shape[:-1], words.shape[-1] // _WORDS_PER_GROUP), mx.float32)
        t = mx.dequantize(words, units, -units, group_size=GROUP, bits=2)[..., :k]
        if scale.ndim == 0:
            return t * scale
        chosen = scale[index]
        if scale.ndim == 1:
            return t * chosen[..., None]
        return t * mx.repeat(chosen, GROUP, axis=-1)[..., :k]


def accumulate(q: mx.array, words: mx.array) -> mx.array:
    """Products with t: q [..., K], int8 or float, with arranged words -> float32 [..., N], or [..., G, N] for [G, N, 8].

    Exact where q holds whole numbers of the int8 range.
    """
    lead, k = q.shape[:-1], q.shape[-1]
    grouped = words.ndim == 3
    width = words.shape[-1] * CODES_PER_WORD * (words.shape[0] if grouped else 1)
    x = q.astype(mx.float32).reshape(-1, k)
    if width != k:
        x = mx.pad(x, [(0, 0), (0, width - k)])
    if not grouped:
        return _unit_product(x, words).reshape(*lead, words.shape[0])
    g, n = words.shape[0], words.shape[1]
    x = x.reshape(-1, g, GROUP).transpose(1, 0, 2)
    return _unit_product(x, words).transpose(1, 0, 2).reshape(*lead, g, n)


def scale_output(acc: mx.array, s: mx.array, scale: mx.array) -> mx.array:
    """(acc / s) * scale in float32, in this order; groups along K added in ascending order (ternary.scale_output).

    acc: float32 [..., N] or [..., G, N]. s: float32 [..., 1]. scale: float32 [] or [N], or [N, G].
    """
    if scale.ndim < 2:
        return (acc / s) * scale
    return _add_groups([(acc[..., g, :] / s) * scale[:, g] for g in range(scale.shape[1])])


def quantize(x: mx.array) -> Codes:
    """ternary.quantize_activations: x [..., K] of any float dtype -> Codes, computed in float32."""
    v = x.astype(mx.float32)
    s = 127 / mx.maximum(mx.abs(v).max(axis=-1, keepdims=True), _MIN_SCALE)
    return Codes(_round_to_int8(v * s), s, x.dtype)


def norm_quantize(x: mx.array, weight: mx.array, eps: float) -> Codes:
    """numpy_ref.norm_quantize: the codes come from x * weight alone; the norm's factor r enters s only."""
    v = x.astype(mx.float32)
    r = rms_factor(v, eps)
    p = v * weight
    a = mx.abs(p).max(axis=-1, keepdims=True)
    c = mx.where(a * r >= _MIN_SCALE, a, _MIN_SCALE / r)
    return Codes(_round_to_int8(p * (127 / c)), 127 / (c * r), x.dtype)


def rms_factor(v: mx.array, eps: float) -> mx.array:
    """1 / sqrt(mean(v^2) + eps): float32 [..., K] -> float32 [..., 1].

    On MLX's CPU device the squares are added in numpy_ref's order, which gives its bits; a GPU takes its own sum.
    """
    squares = v * v
    total = _lane_sum(squares) if mx.default_device() == mx.cpu else squares.sum(axis=-1, keepdims=True)
    return 1 / mx.sqrt(total / v.shape[-1] + eps)


def gated(gate_up: mx.array, act: str, training: bool = False) -> mx.array:
    """numpy_ref.gated of [..., 2 F], gate first, of any float dtype: float32 [..., F].

    relu2: max(gate, 0)^2 * up. silu: gate / (1 + e^-gate) * up. training: by MLX's own sigmoid, whose gradient is one
    operation and whose last bit is the device's.
    """
    gate, up = mx.split(gate_up.astype(mx.float32), 2, axis=-1)
    if act == "relu2":
        positive = mx.maximum(gate, 0)
        return positive * positive * up
    if training:
        return gate * mx.sigmoid(gate) * up
    return gate / (1 + exp(-gate)) * up


def exp(x: mx.array) -> mx.array:
    """numpy_ref.exp, float32: the same basic operations in the same order."""
    x = mx.minimum(mx.maximum(x, float(EXP_LOW)), float(EXP_HIGH))
    n = mx.stop_gradient(mx.round(x * float(LOG2E)))
    r = (x - n * float(LN2_HIGH)) - n * float(LN2_LOW)
    p: mx.array | float = float(EXP_POLYNOMIAL[0])
    for c in EXP_POLYNOMIAL[1:]:
        p = p * r + float(c)
    y = (p * (r * r) + r) + 1
    return y * ((n.astype(mx.int32) + 127) << 23).view(mx.float32)


def row_limit() -> int | None:
    """How many rows one stock quantised product may take on this device; None where there is no limit."""
    return _CUDA_ROWS if mx.default_device() == mx.gpu and mx.cuda.is_available() else None


def _finished(y: mx.array, bias: mx.array | None, residual: mx.array | None, dtype: mx.Dtype) -> mx.array:
    """float32 y plus bias, in the model's dtype, plus the residual."""
    out = (y if bias is None else y + bias).astype(dtype)
    if residual is None:
        return out
    return (residual.astype(mx.float32) + out.astype(mx.float32)).astype(dtype)


def _round_to_int8(v: mx.array) -> mx.array:
    return mx.clip(mx.round(v), -128, 127)


def _lane_sum(v: mx.array) -> mx.array:
    """numpy_ref.lane_sum over the last axis, which is kept with length 1."""
    rest = -v.shape[-1] % LANES
    if rest:
        v = mx.pad(v, [(0, 0)] * (v.ndim - 1) + [(0, rest)])
    lanes = v.reshape(*v.shape[:-1], -1, LANES).sum(axis=-2)
    half = LANES // 2
    while half:
        lanes = lanes[..., :half] + lanes[..., half : 2 * half]
        half //= 2
    return lanes


def _add_groups(parts: list[mx.array]) -> mx.array:
    """Sum in ascending order, from zero (so that a single -0 becomes +0, as in the reference)."""
    y = mx.zeros(parts[0].shape, mx.float32)
    for part in parts:
        y = y + part
    return y


def _unit_product(x: mx.array, words: mx.array) -> mx.array:
    """float32 [(G,) M, K] by words [(G,) N, K / 16] -> float32 [(G,) M, N]."""
    scales, biases = _units((*words.shape[:-1], words.shape[-1] // _WORDS_PER_GROUP))
    limit = row_limit() or x.shape[-2]
    parts = [
        mx.quantized_matmul(x[..., at : at + limit, :], words, scales, biases, transpose=True, group_size=GROUP, bits=2)
        for at in range(0, x.shape[-2], max(limit, 1))
    ]
    if not parts:
        return mx.zeros((*x.shape[:-1], words.shape[-2]), mx.float32)
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-2)


@lru_cache(maxsize=64)
def _units(shape: tuple[int, ...]) -> tuple[mx.array, mx.array]:
    """Ones and minus ones, one pair for all layers of a shape; evaluated, since a lazy array belongs to its thread."""
    ones = mx.ones(shape, mx.float32)
    units = ones, -ones
    mx.eval(units)
    return units
