"""Our kernels on the GPU that is here: exact or not, how fast, and which are off."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from bitnet_mlx.backends.kernels import check, chips, row_attention, tune
from bitnet_mlx.backends.kernels.chooser import Measured
from bitnet_mlx.backends.kernels.problem import Product, product_data
from bitnet_mlx.backends.kernels.products import ROWS as MOST_ROWS
from bitnet_mlx.backends.kernels.products import layouts
from bitnet_mlx.backends.kernels.row_fused import FusedProduct
from bitnet_mlx.backends.kernels.row_kernels import FloatProduct, Quantiser, RopeKv, RowKernel
from bitnet_mlx.backends.kernels.source import Platform
from bitnet_mlx.backends.mlx_import import mx
from bitnet_mlx.doctor.products import MANY_ROWS, ROWS, Shape, share
from bitnet_mlx.doctor.report import KernelReport, Machine, ProductReport, SwitchedOff

_DTYPE = "bfloat16"  # of models on GPUs
_EPS = 1e-5
_HEADS = ((6, 2, 64), (20, 5, 128))  # heads, heads of keys and values, their width: the embedded model's and 2B-4T's


class KernelDoctor:
    """Examines the kernels of one platform through the chooser that models use, so that what it finds is remembered."""

    def __init__(self, chooser: Measured, machine: Machine, progress: Callable[[str], None]) -> None:
        self.chooser, self.machine, self.progress = chooser, machine, progress
        self.tuner = chooser.tuner
        self.platform: Platform = chooser.platform

    def products(self, shapes: Sequence[Shape], rows: Sequence[int] = (*ROWS, MANY_ROWS)) -> list[ProductReport]:
        """Each shape with each number of rows; where our kernel is off, stock MLX in float32, which takes its place."""
        found = []
        for shape in shapes:
            for m in rows:
                self.progress(f"{self.platform}: {m} rows with {shape.n} x {shape.k}")
                found.append(self._product(shape, m))
        return found

    def _product(self, shape: Shape, m: int) -> ProductReport:
        product = Product(shape.n, shape.k, m, shape.scale, _DTYPE)
        candidate = self.chooser.product(product)
        data = product_data(product)
        arrays = tune.on_device(product, data)
        stock, bfloat16 = self.tuner.stock_times(product, arrays)
        if candidate is None:
            y = tune.stock_chain(self.tuner.stock, arrays, product, 1)
            values = np.array(y.astype(mx.float32))[:, data.columns]
            verdict, took = check.compared(values, data.expected(_DTYPE, False, True)), stock
        else:
            verdict, took = self.tuner.measured(product, candidate, data, arrays)
            verdict += self.tuner.verdict(product, candidate, data)
        found = ProductReport(self.platform, shape.n, shape.k, m, verdict.exact, verdict.text, took)
        found.kernel = candidate.label if candidate else None
        found.reason = "" if candidate else self._reason(product)
        if took:
            found.to_float32 = stock / took if stock else None
            found.to_bfloat16 = bfloat16 / took if bfloat16 else None
            found.share = share(shape, took / 1e6, self.machine.bandwidth) if m == 1 else None
        chip = chips.find(self.machine.chip, self.machine.gpu_cores)
        if chip and candidate and m == 1:
            found.predicted = chips.predicted_share(chip, chips.MATVEC_CYCLES)
        return found

    def _reason(self, product: Product) -> str:
        known = self.chooser.choices.get(self.chooser.question(product))
        return known.reason if known else ""

    def row_kernels(self, shapes: Sequence[Shape]) -> list[KernelReport]:
        """Quantisers, rotary embedding, attention and 16-bit products: checked now, whatever was remembered."""
        found = []
        for kernel in self._row_kernels(shapes):
            self.progress(f"{self.platform}: {kernel.question}")
            self.chooser.allows(kernel)
            verdict = kernel.check(self.tuner.runner)
            found.append(KernelReport(self.platform, kernel.question, verdict.sound, verdict.text, verdict.ties))
        return found

    def _row_kernels(self, shapes: Sequence[Shape]) -> list[RowKernel]:
        kernels: list[RowKernel] = []
        widest = max(shape.k for shape in shapes)
        for k in sorted({shape.k for shape in shapes}):
            for layout in layouts(self.platform, k):
                kernels += [Quantiser(k, layout, _DTYPE, norm, "", _EPS if norm else 0.0) for norm in (False, True)]
                if k == widest:
                    kernels += [Quantiser(k, layout, _DTYPE, norm, act, _EPS if norm else 0.0) for norm, act in _GATES]
        kernels += self._fused(shapes)
        kernels += [RopeKv(*heads, _DTYPE) for heads in _HEADS]
        kernels += [kernel for heads in _HEADS for kernel in row_attention.both(*heads, _DTYPE)]
        first = shapes[0]
        return [*kernels, *(FloatProduct(first.n, first.k, m, first.scale, _DTYPE) for m in (1, MOST_ROWS))]

    def _fused(self, shapes: Sequence[Shape]) -> list[RowKernel]:
        """What takes the place of a quantiser and a product for one row, where such a product is on. A layer adds its
        residual where the outputs are no more than the inputs, and the widest input is a gate's."""
        found: list[RowKernel] = []
        widest = max(shape.k for shape in shapes)
        for n, k, scale in shapes if self.platform == "cuda" else ():
            separate = self.chooser.product(Product(n, k, 1, scale, _DTYPE))
            if separate is not None and scale != "group":
                quantiser = Quantiser(k, separate.layout, _DTYPE, True, "relu2" if k == widest else "", _EPS)
                found.append(FusedProduct(quantiser, separate, n, scale, False, n <= k, self.tuner.runner))
        return found

    def switched_off(self) -> list[SwitchedOff]:
        """From the file of choices: what is off, now or since an earlier start, and single variants that are wrong."""
        found = []
        for question, choice in sorted(self.chooser.choices.all().items()):
            if choice.label is None and (choice.fault or not tune.optional(question)):
                found.append(SwitchedOff(self.platform, question, choice.reason, choice.fault))
            elif choice.fault:
                found.append(SwitchedOff(self.platform, f"{question}, some variants", choice.reason, True))
        return found


_GATES = ((True, "relu2"), (False, "silu"))
