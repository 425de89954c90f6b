"""Ternary products at the shapes of real models, by the engines that need no kernel of ours: cpu, and stock MLX on the CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from bitnet_mlx.backends import missing, numpy_ref
from bitnet_mlx.backends.kernels.problem import Product, product_data
from bitnet_mlx.doctor.report import ProductReport
from bitnet_mlx.ternary import TernaryTensor

ROWS = (1, 2, 8, 16)
MANY_ROWS = 1024  # of a long prompt, on GPUs alone
_CPU_ROWS = (1, 8, 16)
_QUICK = 0.05  # seconds; what took longer is not repeated
_REPEATS = 5


class Shape(NamedTuple):
    """A product of a model's layer: weight [N, K] and the kind of its scale."""

    n: int
    k: int
    scale: str


# Attention's output, q with k and v, gate with up, and down; of the embedded model and of bitnet-b1.58-2B-4T.
EMBEDDED = (Shape(384, 384, "tensor"), Shape(640, 384, "row"), Shape(2048, 384, "row"), Shape(384, 1024, "tensor"))
MODEL_2B = (
    Shape(2560, 2560, "tensor"),
    Shape(3840, 2560, "row"),
    Shape(13824, 2560, "row"),
    Shape(2560, 6912, "tensor"),
)
SHAPES = (*EMBEDDED, *MODEL_2B)


def products(progress: Callable[[str], None], shapes: Sequence[Shape], bandwidth: float | None) -> list[ProductReport]:
    """On the CPU: the cpu engine, and stock MLX in float32, where they are installed."""
    found = []
    for shape in shapes:
        progress(f"products with {shape.n} x {shape.k}")
        weight, x, expected = _problem(shape)
        stock: dict[int, float] = {}
        if not missing("mlx"):
            from bitnet_mlx.doctor.stock_mlx import StockProduct

            run = StockProduct(weight)
            for m in _CPU_ROWS:
                y, stock[m] = _timed(partial(run, x[:m]))
                found.append(_report("mlx", shape, y, expected[:m], stock[m], None, bandwidth))
        if not missing("cpu"):
            for m in _CPU_ROWS:
                y, seconds = _cpu(weight, x[:m])
                found.append(_report("cpu", shape, y, expected[:m], seconds, stock.get(m), bandwidth))
    return found


def _problem(shape: Shape) -> tuple[TernaryTensor, np.ndarray, np.ndarray]:
    """(weight, x float32 [16, K], expected float32 [16, N]); each row is a problem of its own."""
    m = max(_CPU_ROWS)
    weight = product_data(Product(shape.n, shape.k, 1, shape.scale, "float32")).weight
    x = np.random.default_rng(shape.k).standard_normal((m, shape.k)).astype(np.float32)
    x *= np.float32(10.0) ** np.linspace(-3, 3, m, dtype=np.float32)[:, None]
    return weight, x, numpy_ref.ternary_linear(x, weight)


def _cpu(weight: TernaryTensor, x: np.ndarray) -> tuple[np.ndarray, float]:
    from bitnet_mlx.backends.cpu_jit import threads
    from bitnet_mlx.doctor.cpu_product import CpuProduct

    run = CpuProduct(weight, len(x), threads.get_threads())
    run.quantise(x)
    return _timed(run.multiply)


def _timed(run: Callable[[], np.ndarray]) -> tuple[np.ndarray, float]:
    """(result, median seconds); the first run is not counted where it is quick."""
    times = []
    y = np.zeros(0)
    for _ in range(_REPEATS):
        started = time.perf_counter()
        y = run()
        times.append(time.perf_counter() - started)
        if times[0] > _QUICK:
            break
    return y, statistics.median(times[1:] or times)


def _report(
    backend: str,
    shape: Shape,
    y: np.ndarray,
    expected: np.ndarray,
    seconds: float,
    stock: float | None,
    bandwidth: float | None,
) -> ProductReport:
    wrong = int((y != expected).sum())
    text = f"{wrong} of {y.size} outputs are wrong" if wrong else "exact"
    found = ProductReport(backend, shape.n, shape.k, len(y), not wrong, text, seconds * 1e6)
    found.to_float32 = stock / seconds if stock else None
    found.share = share(shape, seconds, bandwidth) if len(y) == 1 else None
    return found


def share(shape: Shape, seconds: float, bandwidth: float | None) -> float | None:
    """Of the bandwidth (GB/s) of a copy, by the weight's bytes: two bits a code."""
    return shape.n * shape.k / 4 / seconds / 1e9 / bandwidth if bandwidth else None
