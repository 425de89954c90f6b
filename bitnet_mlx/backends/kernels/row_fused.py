"""The product that quantises its own row as a row kernel: checked against the reference, timed against separate kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from bitnet_mlx.backends import numpy_ref
from bitnet_mlx.backends.kernels import check, fused, problem, tune
from bitnet_mlx.backends.kernels.launch import Launch
from bitnet_mlx.backends.kernels.products import Candidate, Runner
from bitnet_mlx.backends.kernels.row_kernels import Quantiser
from bitnet_mlx.backends.kernels.run import DTYPES
from bitnet_mlx.backends.mlx_import import mx
from bitnet_mlx.ternary import TernaryTensor, quantize_activations

_ROWS = 10  # of problem.activations: one of each kind


@dataclass(frozen=True)
class FusedProduct:
    """quantiser, separate: the two kernels that it replaces. n: outputs. scale: "tensor" or "row". runner: runs those two."""

    quantiser: Quantiser
    separate: Candidate
    n: int
    scale: str
    bias: bool
    residual: bool
    runner: Runner = field(compare=False)

    @property
    def question(self) -> str:
        parts = [f"{tune.FUSED} {self.n}x{self.quantiser.k}", self.scale, self.quantiser.dtype, self.quantiser.act]
        parts += [f"norm {self.quantiser.eps:g}"] if self.quantiser.norm else []
        parts += ["bias"] * self.bias + ["residual"] * self.residual
        return " ".join(p for p in parts if p)

    @property
    def possible(self) -> bool:
        """Whether there is a form for this: none where a row is too wide."""
        return bool(self._forms)

    @property
    def _forms(self) -> tuple[fused.FusedVariant, ...]:
        return fused.variants(self.n, self.quantiser.k, self.quantiser.norm)

    def launch(
        self, x: Any, weight: Any | None, words: Any, scale: Any, bias: Any | None = None, residual: Any | None = None
    ) -> Launch:
        quantiser = self.quantiser
        return fused.fused_matvec(
            x, weight, words, scale, bias, residual, variant=self._forms[0], dtype=quantiser.dtype, eps=quantiser.eps,
            act=quantiser.act or None,
        )  # fmt: skip

    @cached_property
    def _data(self) -> problem.ProductData:
        """With the codes of rows of every kind in place of random ones."""
        quantiser, n, k = self.quantiser, self.n, self.quantiser.k
        data = problem.product_data(problem.Product(n, k, _ROWS, self.scale, quantiser.dtype))
        x = quantiser.inputs(_ROWS)
        v = numpy_ref.gated(x[:, :k], x[:, k:], quantiser.act) if quantiser.act else x
        norm = self._weight
        q, s = quantize_activations(v) if norm is None else numpy_ref.norm_quantize(v, norm, quantiser.eps)
        chosen = TernaryTensor(data.weight.words[data.columns], np.ones((), np.float32), (len(data.columns), k))
        acc = numpy_ref.accumulate(q, chosen)
        return problem.ProductData(q, s, data.weight, data.bias, data.residual, data.columns, acc)

    @property
    def _weight(self) -> np.ndarray | None:
        k = self.quantiser.k
        return np.random.default_rng(k).uniform(0.5, 2, k).astype(np.float32) if self.quantiser.norm else None

    def check(self, runner: Runner) -> check.Verdict:
        """Outputs for rows of every kind, equal to the bit."""
        data, norm, dtype = self._data, self._weight, DTYPES[self.quantiser.dtype]
        words, scale = mx.array(data.weight.words), mx.array(data.weight.scale)
        weight, bias = None if norm is None else mx.array(norm), mx.array(data.bias) if self.bias else None
        x, residual = mx.array(self.quantiser.inputs(_ROWS)).astype(dtype), mx.array(data.residual).astype(dtype)

        def outputs(row: int) -> np.ndarray:
            added = residual[row : row + 1] if self.residual else None
            y = runner(self.launch(x[row : row + 1], weight, words, scale, bias, added))[0]
            return np.array(y.astype(mx.float32))[:, data.columns]

        def checked() -> check.Verdict:
            found = np.concatenate([outputs(row) for row in range(_ROWS)])
            return check.compared(found, data.expected(self.quantiser.dtype, self.bias, self.residual))

        return check.guarded(checked)

    @cached_property
    def _arrays(self) -> tune.Arrays:
        """Weights in copies past the cache."""
        product = problem.Product(self.n, self.quantiser.k, 1, self.scale, self.quantiser.dtype)
        return tune.on_device(product, problem.product_data(product))

    def chain(self, runner: Runner | None, calls: int) -> mx.array:
        """runner None: by the two kernels."""
        arrays, dtype = self._arrays, self.quantiser.dtype
        step = self._both if runner is None else self._one(runner)
        first = x = mx.array(self.quantiser.inputs(1)).astype(DTYPES[dtype])
        weight = mx.ones(self.quantiser.k) if self.quantiser.norm else None
        bias = mx.zeros(self.n) if self.bias else None
        y = arrays.residual
        for i in range(calls):
            words = arrays.words[i % len(arrays.words)]
            y = step(x, weight, words, arrays.scale, bias, y if self.residual else None)
            x = first + y[:, :1] * 0  # so that the next call waits for this one
        return y

    def _one(self, runner: Runner) -> Callable[..., mx.array]:
        return lambda *arrays: runner(self.launch(*arrays))[0]

    def _both(self, x: mx.array, weight: mx.array | None, *product: Any) -> mx.array:
        rows = self.runner(self.quantiser.launch(x, weight))[0]
        return self.separate.run(self.runner, rows, *product, dtype=self.quantiser.dtype)
