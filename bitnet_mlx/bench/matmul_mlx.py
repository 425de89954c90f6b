"""The ternary product alone: ours against stock MLX, at real shapes, with weights rotated past the cache.

Contenders, all on the same words: our kernel as the chooser settles it for this chip; stock `quantized_matmul` in float32,
which is as exact; the same in bfloat16, which rounds its sums; and a dense bfloat16 product.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

import numpy as np

from bitnet_mlx.backends.kernels import check
from bitnet_mlx.backends.kernels.chooser import Measured
from bitnet_mlx.backends.kernels.layout import prepare
from bitnet_mlx.backends.kernels.problem import Product, ProductData, product_data
from bitnet_mlx.backends.kernels.products import ROWS, Candidate, Runner
from bitnet_mlx.backends.mlx_affine import row_limit
from bitnet_mlx.backends.mlx_import import mx
from bitnet_mlx.bench.turns_mlx import Call, Time, after, take_turns
from bitnet_mlx.ternary import GROUP

_ROTATED = 150e6  # bytes of weights that the calls go through
CALLS, REPEATS = 256, 21  # of one chain, and chains; a GPU then works on some calls while others are encoded
_FEW = 32  # calls of a chain where there are many rows


@dataclass(frozen=True)
class ProductTimes:
    """Microseconds a call of each contender at one shape, in a chain (times) and many at once (together).

    floor: microseconds that the weights' bytes take at the copy's bandwidth. Without "ours" where our kernel is off.
    """

    n: int
    k: int
    m: int
    kernel: str
    exact: bool
    floor: float
    times: dict[str, Time]
    together: dict[str, Time]

    def record(self) -> dict[str, object]:
        """For JSON; ratios: how many times as long each contender takes as ours, in a chain."""
        ours = self.times.get("ours")
        others = () if ours is None else ((name, t.median / ours.median) for name, t in self.times.items())
        return {**asdict(self), "ratios": {name: round(ratio, 3) for name, ratio in others if name != "ours"}}


def measure(shapes: Iterable[tuple[int, int, int]], chooser: Measured, bytes_a_second: float) -> Iterator[ProductTimes]:
    """Time each (N, K, M); a shape for which our kernel is off is measured without it."""
    for n, k, m in shapes:
        yield _measure(Product(n, k, m, "tensor", "bfloat16"), chooser, bytes_a_second)


def _measure(product: Product, chooser: Measured, bytes_a_second: float) -> ProductTimes:
    data = product_data(product)
    words = mx.array(data.weight.words)
    copies = min(max(2, int(_ROTATED / words.nbytes)), CALLS)
    weights = [words + 0 for _ in range(copies)]
    mx.eval(weights)
    contenders = _stock(product, data, weights)
    candidate, runner = chooser.product(product), chooser.tuner.runner
    exact = False
    if candidate is not None:
        exact = check.product(candidate, data, product.dtype, runner, ((False, False),)).exact
        contenders = {"ours": _ours(candidate, data, weights, runner), **contenders}
    contenders["dense bfloat16"] = _dense(product)
    calls = CALLS if product.m <= ROWS else _FEW
    times = take_turns(contenders, calls, REPEATS)
    together = take_turns(contenders, calls, REPEATS, chained=False)
    floor = words.nbytes / bytes_a_second * 1e6
    label = "off" if candidate is None else candidate.label
    return ProductTimes(product.n, product.k, product.m, label, exact, floor, times, together)


def _ours(candidate: Candidate, data: ProductData, weights: list[mx.array], runner: Runner) -> Call:
    rows, scale = mx.array(prepare(data.q, data.s, candidate.layout)), mx.array(data.weight.scale)

    def call(i: int, before: mx.array | None) -> mx.array:
        return candidate.run(runner, after(rows, before), weights[i % len(weights)], scale, dtype="bfloat16")

    return call


def _stock(product: Product, data: ProductData, weights: list[mx.array]) -> dict[str, Call]:
    """Stock MLX in float32 and bfloat16; scales 1 and biases -1 as our own use of it has them."""
    n, k, m = product.n, product.k, product.m
    width = weights[0].shape[1] * 16

    def contender(dtype: mx.Dtype) -> Call:
        x = mx.pad(mx.array(data.q).astype(dtype), [(0, 0), (0, width - k)])
        unit = mx.ones((n, width // GROUP), dtype)
        mx.eval(x, unit)

        def call(i: int, before: mx.array | None) -> mx.array:
            w = weights[i % len(weights)]
            return mx.quantized_matmul(after(x, before), w, unit, -unit, transpose=True, group_size=GROUP, bits=2)

        return call

    found = {"stock bfloat16": contender(mx.bfloat16)}
    limit = row_limit()
    if limit is None or m <= limit:
        found["stock float32"] = contender(mx.float32)
    return found


def _dense(product: Product) -> Call:
    n, k, m = product.n, product.k, product.m
    rng = np.random.default_rng(0)
    x = mx.array(rng.standard_normal((m, k)).astype(np.float32)).astype(mx.bfloat16)
    copies = max(2, min(CALLS, int(_ROTATED / (2 * n * k)) + 1))
    weights = [mx.random.normal((n, k)).astype(mx.bfloat16) for _ in range(copies)]
    mx.eval(x, weights)

    def call(i: int, before: mx.array | None) -> mx.array:
        return after(x, before) @ weights[i % len(weights)].T

    return call
