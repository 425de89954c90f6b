"""The operations of a packed ternary decoder by our kernels, each with stock MLX behind it for what they do not take."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from bitnet_mlx.backends.attention_mlx import RECENT
from bitnet_mlx.backends.kernels import attention, check, products
from bitnet_mlx.backends.kernels.biased import BiasedProduct
from bitnet_mlx.backends.kernels.chooser import BestGuess, Chooser, asked
from bitnet_mlx.backends.kernels.layout import Layout
from bitnet_mlx.backends.kernels.layout_mlx import prepare_mlx, scales_mlx
from bitnet_mlx.backends.kernels.problem import Product
from bitnet_mlx.backends.kernels.products import ROWS, Runner
from bitnet_mlx.backends.kernels.row_attention import DecodeAttention
from bitnet_mlx.backends.kernels.row_fused import FusedProduct
from bitnet_mlx.backends.kernels.row_kernels import FloatProduct, Quantiser, RopeKv
from bitnet_mlx.backends.kernels.run import DTYPES, run
from bitnet_mlx.backends.kernels.source import Platform
from bitnet_mlx.backends.mlx_affine import Codes, StockOps
from bitnet_mlx.backends.mlx_import import mx
from bitnet_mlx.ternary import SCALES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PREPARED = (1, 512)  # rows whose kernels are chosen when a model is built; others when they first occur


class KernelOps(StockOps):
    """StockOps by our kernels on "metal" or "cuda".

    runner: launches a kernel; MLX by default, the emulated grid in tests. chooser: settles which kernel runs; the best
    guess, unchecked, by default (backends.metal and backends.cuda give a measured one).
    Words stay as they lie in the file, [N, W]. Codes keep the leading dimensions of x, whatever their layout.
    """

    def __init__(self, platform: Platform, runner: Runner | None = None, chooser: Chooser | None = None) -> None:
        self.name = platform
        self.platform: Platform = platform
        self.compiles = runner is None  # a graph that another runner is part of cannot be traced
        self.runner: Runner = runner or partial(run, platform=platform)
        self.chooser: Chooser = chooser or BestGuess(platform)
        self.dtype = "bfloat16"  # of the model, from `prepare`
        self._attends: dict[tuple[int, int, int, int, int, mx.Dtype], bool] = {}

    def prepare(self, shapes: Iterable[tuple[int, int, str]], dtype: str) -> None:
        """Choose kernels for a model's products and its dtype."""
        self.dtype = dtype
        for n, k, scale in sorted(shapes):
            for m in _PREPARED:
                self.chooser.product(Product(n, k, m, scale, dtype))

    def target(self, words: mx.array, scale: mx.array, m: int, k: int) -> Layout | None:
        candidate = self._candidate(words, scale, m, k, self.dtype)
        return None if candidate is None else candidate.layout

    def arrange(self, words: mx.array, scale: mx.array) -> mx.array:
        """As they are, whatever the scale."""
        return words

    def quantize(self, x: mx.array, to: Layout | None = None) -> Codes:
        return self._codes(x, to, None, 0.0, "") or relaid(super().quantize(x), to)

    def norm_quantize(self, x: mx.array, weight: mx.array, eps: float, to: Layout | None = None) -> Codes:
        return self._codes(x, to, weight, eps, "") or relaid(super().norm_quantize(x, weight, eps), to)

    def gated_quantize(
        self, gate_up: mx.array, act: str, weight: mx.array | None, eps: float, to: Layout | None = None
    ) -> Codes:
        ours = self._codes(gate_up, to, weight, eps, act)
        return ours or relaid(super().gated_quantize(gate_up, act, weight, eps), to)

    def linear(
        self,
        codes: Codes,
        words: mx.array,
        scale: mx.array,
        bias: mx.array | None = None,
        residual: mx.array | None = None,
    ) -> mx.array:
        lead, n = codes.q.shape[:-1], words.shape[0]
        m = codes.rows
        dtype = _NAMES[codes.dtype]
        candidate = None if codes.layout is None else self._candidate(words, scale, m, codes.columns, dtype)
        if candidate is not None and bias is not None:
            product = asked(Product(n, codes.columns, m, SCALES[scale.ndim], dtype))
            candidate = candidate if self.chooser.allows(BiasedProduct(product, candidate)) else None
        if candidate is None or candidate.layout != codes.layout:
            return super().linear(plain(codes), super().arrange(words, scale), scale, bias, residual)
        added = None if residual is None else residual.reshape(m, n)
        return candidate.run(self.runner, codes.q.reshape(m, -1), words, scale, bias, added, dtype=dtype).reshape(
            *lead, n
        )

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
        kernel = self._fused(x, words, scale, bias is not None, residual is not None, norm is not None, eps, act)
        if kernel is None:
            return super().fused_linear(x, words, scale, bias, residual, norm=norm, eps=eps, act=act)
        n = words.shape[0]
        added = None if residual is None else residual.reshape(1, n)
        y = self.runner(kernel.launch(x.reshape(1, -1), norm, words, scale, bias, added))[0]
        return y.reshape(*x.shape[:-1], n)

    def float_linear(
        self,
        x: mx.array,
        words: mx.array,
        scale: mx.array,
        bias: mx.array | None = None,
        residual: mx.array | None = None,
    ) -> mx.array:
        lead, k = x.shape[:-1], x.shape[-1]
        n, m = words.shape[0], x.size // k
        kernel = FloatProduct(n, k, m, SCALES[scale.ndim], _NAMES[x.dtype], bias is not None)
        if not 1 <= m <= ROWS or not self.chooser.allows(kernel):
            return super().float_linear(x, super().arrange(words, scale), scale, bias, residual)
        added = None if residual is None else residual.reshape(m, n)
        return self.runner(kernel.launch(x.reshape(m, k), words, scale, bias, added))[0].reshape(*lead, n)

    def rope_kv(
        self, qkv: mx.array, cos: mx.array, sin: mx.array, heads: int, kv_heads: int
    ) -> tuple[mx.array, mx.array]:
        kernel = RopeKv(heads, kv_heads, qkv.shape[-1] // (heads + 2 * kv_heads), _NAMES[qkv.dtype])
        if not self.chooser.allows(kernel):
            return super().rope_kv(qkv, cos, sin, heads, kv_heads)
        q, kv = self.runner(kernel.launch(qkv, cos, sin))
        return q, kv

    def attends(self, batch: int, heads: int, kv_heads: int, dim: int, room: int, dtype: mx.Dtype) -> bool:
        """Whether the kernel that such a call takes is on; asked for every token, so the answer is kept."""
        asked = (batch, heads, kv_heads, dim, room, dtype)
        if asked not in self._attends:
            self._attends[asked] = self._attention(batch, heads, kv_heads, dim, room, RECENT, dtype) is not None
        return self._attends[asked]

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
        batch, room, slots, dim = qkv.shape[0], past.shape[3], recent.shape[3], past.shape[4]
        kernel = self._attention(batch, heads, kv_heads, dim, room, slots, qkv.dtype)
        if kernel is None:
            return super().decode_attention(qkv, cos, sin, past, recent, lengths, heads, kv_heads)
        return kernel.run(self.runner, qkv, cos, sin, past, recent, lengths)

    def _attention(
        self, batch: int, heads: int, kv_heads: int, dim: int, room: int, slots: int, dtype: mx.Dtype
    ) -> DecodeAttention | None:
        """The kernel of such a call; None where there is none or it is off."""
        if not attention.possible(heads, kv_heads, dim):
            return None
        kernel = DecodeAttention.of(batch, heads, kv_heads, dim, room, slots, _NAMES[dtype])
        return kernel if self.chooser.allows(kernel) else None

    def _candidate(self, words: mx.array, scale: mx.array, m: int, k: int, dtype: str) -> products.Candidate | None:
        return self.chooser.product(Product(words.shape[0], k, m, SCALES[scale.ndim], dtype)) if m else None

    def _fused(
        self,
        x: mx.array,
        words: mx.array,
        scale: mx.array,
        bias: bool,
        residual: bool,
        norm: bool,
        eps: float,
        act: str,
    ) -> FusedProduct | None:
        """The kernel for one row that quantises it too; None where there is none, or it or one that it replaces is off."""
        if self.platform != "cuda" or x.size != x.shape[-1] or scale.ndim == 2:
            return None
        k, dtype = x.size // (2 if act else 1), _NAMES[x.dtype]
        separate = self._candidate(words, scale, 1, k, dtype)
        if separate is None or separate.layout != self.target(words, scale, 1, k):
            return None
        quantiser = Quantiser(k, separate.layout, dtype, norm, act, eps)
        kernel = FusedProduct(quantiser, separate, words.shape[0], SCALES[scale.ndim], bias, residual, self.runner)
        if not kernel.possible or not self.chooser.allows(quantiser) or not self.chooser.allows(kernel):
            return None
        return kernel

    def _codes(self, x: mx.array, to: Layout | None, weight: mx.array | None, eps: float, act: str) -> Codes | None:
        """By the quantise kernel; None where there is none for this or it is off."""
        lead, width = x.shape[:-1], x.shape[-1]
        if to is None or not x.size:
            return None
        kernel = Quantiser(width // (2 if act else 1), to, _NAMES[x.dtype], weight is not None, act, eps)
        if not kernel.possible or not self.chooser.allows(kernel):
            return None
        q = self.runner(kernel.launch(x.reshape(-1, width), weight))[0]
        return Codes(q.reshape(*lead, -1), None, x.dtype, to, kernel.k)


def plain(codes: Codes) -> Codes:
    """Codes in float32 and in their own order, whatever layout they are in."""
    if codes.layout is None:
        return codes
    lead, layout, k = codes.q.shape[:-1], codes.layout, codes.columns
    x = codes.q.reshape(codes.rows, -1)
    q = mx.contiguous(x[:, : layout.code_words(k)]).view(DTYPES[layout.dtype]).astype(mx.float32)
    s = scales_mlx(x, layout, k).reshape(*lead, 1)
    return Codes(check.codes_of(q, layout, k).reshape(*lead, -1), s, codes.dtype)


def relaid(codes: Codes, to: Layout | None) -> Codes:
    """Stock codes in a layout where there are rows enough to pay for it: a product kernel may be on, a quantiser off."""
    lead, k = codes.q.shape[:-1], codes.q.shape[-1]
    if to is None or codes.rows <= ROWS:
        return codes
    x = prepare_mlx(codes.q.reshape(-1, k), codes.scales, to)
    return Codes(x.reshape(*lead, -1), None, codes.dtype, to, k)
