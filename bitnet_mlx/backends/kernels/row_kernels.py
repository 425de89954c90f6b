"""The kernels that take a row at a time: quantisers, the rotary embedding, products with 16-bit activations.

Each says how it is launched, checked, and what stock MLX does in its place; the tuner asks nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from bitnet_mlx.backends.kernels import check, matvec, problem, quantize, rope
from bitnet_mlx.backends.kernels.launch import Launch
from bitnet_mlx.backends.kernels.layout import Layout
from bitnet_mlx.backends.kernels.layout_mlx import scales_mlx
from bitnet_mlx.backends.kernels.products import Runner
from bitnet_mlx.backends.kernels.run import DTYPES
from bitnet_mlx.backends.mlx_affine import StockOps
from bitnet_mlx.backends.mlx_import import mx

_STOCK = StockOps()
_LIMIT = 1e5  # of what goes into an activation function: the square of its cube is still a float32


class RowKernel(Protocol):
    """One kernel for given sizes and dtype."""

    @property
    def question(self) -> str:
        """Names it in the file of choices."""
        ...

    def check(self, runner: Runner) -> check.Verdict:
        """Compare it with the reference."""
        ...

    def chain(self, runner: Runner | None, calls: int) -> mx.array:
        """`calls` calls, each of which waits for the one before; runner None: by stock MLX."""
        ...


@dataclass(frozen=True)
class Quantiser:
    """k: columns of the codes. act: "", or the activation function in front, on [M, 2K]. norm: with an RMSNorm."""

    k: int
    layout: Layout
    dtype: str
    norm: bool = False
    act: str = ""
    eps: float = 0.0

    @property
    def question(self) -> str:
        parts = ("quantiser", f"k{self.k}", f"{self.layout.kind}{self.layout.words}", self.dtype, self.act)
        return " ".join([p for p in parts if p] + ([f"norm {self.eps:g}"] if self.norm else []))

    @property
    def possible(self) -> bool:
        """MLX hands an array of fewer than 8 values to a kernel in another address space."""
        return self.k >= 8

    def launch(self, x: Any, weight: Any | None) -> Launch:
        return quantize.quantize(
            x, layout=self.layout, dtype=self.dtype, norm=weight, eps=self.eps, act=self.act or None
        )

    def inputs(self, m: int) -> np.ndarray:
        if not self.act:
            return problem.activations(self.k, m, self.dtype)
        halves = [
            problem.activations(self.k, m, self.dtype, _LIMIT),
            problem.activations(self.k + 1, m, self.dtype, _LIMIT),
        ]
        return np.concatenate([halves[0], np.roll(halves[1][:, : self.k], 3, axis=0)], axis=1)

    def check(self, runner: Runner) -> check.Verdict:
        norm = self.eps if self.norm else None
        return check.quantiser(self.launch, self.inputs(10), self.layout, self.dtype, runner, norm, self.act)

    def chain(self, runner: Runner | None, calls: int) -> mx.array:
        x = mx.array(self.inputs(1)).astype(DTYPES[self.dtype])
        weight = mx.ones(self.k) if self.norm else None
        for _ in range(calls):
            if runner is not None:
                rows = runner(self.launch(x, weight))[0]
                s = scales_mlx(rows, self.layout, self.k)[:, 0]
            elif self.act:
                s = _STOCK.gated_quantize(x, self.act, weight, self.eps).scales
            else:
                s = (_STOCK.quantize(x) if weight is None else _STOCK.norm_quantize(x, weight, self.eps)).scales
            x = x + (s.reshape(1, 1) * 0).astype(x.dtype)  # so that the next call waits for this one
        return x


@dataclass(frozen=True)
class FloatProduct:
    """M rows of 16-bit (or float32) activations times a ternary weight."""

    n: int
    k: int
    m: int
    scale: str
    dtype: str
    bias: bool = False

    @property
    def question(self) -> str:
        return f"float product {self.n}x{self.k} m{self.m} {self.scale} {self.dtype}" + " bias" * self.bias

    @property
    def variant(self) -> Any:
        return matvec.variants(self.n, self.k, self.m)[0]

    def launch(self, x: Any, words: Any, scale: Any, bias: Any | None = None, residual: Any | None = None) -> Launch:
        return matvec.float_matvec(x, words, scale, bias, residual, variant=self.variant, dtype=self.dtype)

    @cached_property
    def _data(self) -> problem.ProductData:
        return problem.product_data(self._product)

    @property
    def _product(self) -> problem.Product:
        return problem.Product(self.n, self.k, self.m, self.scale, self.dtype)

    def check(self, runner: Runner) -> check.Verdict:
        def checked(data: problem.ProductData) -> check.Verdict:
            return check.floats(self.launch, data, self.dtype, runner, ((self.bias, False), (self.bias, True)))

        return checked(self._data) + checked(problem.product_data(replace(self._product, reach=1)))

    def chain(self, runner: Runner | None, calls: int) -> mx.array:
        data = self._data
        words, scale = mx.array(data.weight.words), mx.array(data.weight.scale)
        x = mx.array(data.q.astype(np.float32)).astype(DTYPES[self.dtype])
        y = mx.array(data.residual).astype(DTYPES[self.dtype])
        arranged, bias = _STOCK.arrange(words, scale), mx.array(data.bias) if self.bias else None
        for _ in range(calls):
            if runner is None:
                y = _STOCK.float_linear(x, arranged, scale, bias, y)
            else:
                y = runner(self.launch(x, words, scale, bias, y))[0]
        return y


@dataclass(frozen=True)
class RopeKv:
    """The split into heads with the rotary embedding, written as the cache keeps it."""

    heads: int
    kv_heads: int
    dim: int
    dtype: str

    @property
    def question(self) -> str:
        return f"rope {self.heads}+{self.kv_heads} heads of {self.dim} {self.dtype}"

    def launch(self, qkv: Any, cos: Any, sin: Any) -> Launch:
        return rope.rope_kv(qkv, cos, sin, heads=self.heads, kv_heads=self.kv_heads, dtype=self.dtype)

    def check(self, runner: Runner) -> check.Verdict:
        return check.rope(self.launch, self.heads, self.kv_heads, self.dim, self.dtype, runner)

    def chain(self, runner: Runner | None, calls: int) -> mx.array:
        width = (self.heads + 2 * self.kv_heads) * self.dim
        x = mx.ones((1, 1, width), DTYPES[self.dtype])
        angle = mx.ones((1, 1, self.dim // 2), mx.float32)
        for _ in range(calls):
            if runner is None:
                q, kv = _STOCK.rope_kv(x, angle, angle, self.heads, self.kv_heads)
            else:
                q, kv = runner(self.launch(x, angle, angle))
            x = x + q.reshape(-1)[:1] * 0 + kv.reshape(-1)[:1] * 0
        return x
