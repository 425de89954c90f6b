"""A settled product that adds a bias: to the compiler another kernel, and so checked by itself where a model has one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from bitnet_mlx.backends.kernels import check, tune
from bitnet_mlx.backends.kernels.layout import prepare
from bitnet_mlx.backends.kernels.problem import Product, ProductData, product_data
from bitnet_mlx.backends.kernels.products import Candidate, Runner
from bitnet_mlx.backends.mlx_affine import StockOps
from bitnet_mlx.backends.mlx_import import mx

_STOCK = StockOps()
_BIASED = ((True, False), (True, True))  # (bias, residual)


@dataclass(frozen=True)
class BiasedProduct:
    """product: with a measured number of rows. candidate: the kernel that won for it without a bias."""

    product: Product
    candidate: Candidate

    @property
    def question(self) -> str:
        return f"biased {self.product} {self.candidate.label}"

    @cached_property
    def _data(self) -> ProductData:
        return product_data(self.product)

    @cached_property
    def _arrays(self) -> tune.Arrays:
        return tune.on_device(self.product, self._data)

    def check(self, runner: Runner) -> check.Verdict:
        data = tune.checkable(self.product, self._data)
        return check.product(self.candidate, data, self.product.dtype, runner, _BIASED)

    def chain(self, runner: Runner | None, calls: int) -> mx.array:
        bias = mx.array(self._data.bias)
        if runner is None:
            return tune.stock_chain(_STOCK, self._arrays, self.product, calls, bias)
        rows = mx.array(prepare(self._data.q, self._data.s, self.candidate.layout))
        return tune.kernel_chain(self.candidate, rows, self._arrays, self.product, runner, bias)(calls)
