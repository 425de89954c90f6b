"""The choice of a kernel by measuring: each variant is checked first, then timed against stock MLX, on the user's chip."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from bitnet_mlx.backends.kernels import check
from bitnet_mlx.backends.kernels.choices import Choice
from bitnet_mlx.backends.kernels.layout import prepare
from bitnet_mlx.backends.kernels.problem import Product, ProductData, product_data
from bitnet_mlx.backends.kernels.products import ROWS, Candidate, Runner, candidates
from bitnet_mlx.backends.kernels.row_kernels import RowKernel
from bitnet_mlx.backends.kernels.run import DTYPES
from bitnet_mlx.backends.kernels.source import Platform
from bitnet_mlx.backends.mlx_affine import Codes, StockOps
from bitnet_mlx.backends.mlx_import import mx
from bitnet_mlx.ternary import GROUP

FUSED = "fused"  # how questions about kernels that replace others of ours start
_log = logging.getLogger(__name__)
BUCKETS = (1, 2, 4, 8, 16, 64, 512, 2048)  # rows of activations that are measured
_CHECKED_ROWS = 67  # more rows than these are checked on 67 by numpy, and whole against stock MLX
_ROTATED = 96 << 20  # bytes of weights that calls take turns over, so that none is read from a cache
_COPIES = 48
_REPEATS = 7
_CALLS = (4, 64)  # of one chain
_BUDGET = 0.02  # seconds that the timing of one variant may take, about
_PATIENCE = 2.0  # seconds for all variants of one question, about; compiling them takes most of it
_PLAIN, _ADDED = ((False, False),), ((False, True),)  # (bias, residual)
_LEAST = 3  # variants that are tried even so
# MLX compiles a CUDA kernel anew in every process, about three seconds each on the machine measured: there one variant
# is tried, in the model's own dtype alone.
_THRIFTY: Platform = "cuda"

Chain = Callable[[int], mx.array]
Timer = Callable[[str, Chain], float]


def bucket(m: int) -> int:
    """The measured number of rows that stands for m: for a mat-vec the next one up, beyond the nearest by ratio."""
    if m <= ROWS:
        return next(b for b in BUCKETS if b >= m)
    return min((b for b in BUCKETS if b > ROWS), key=lambda b: max(b, m) / min(b, m))


def optional(question: str) -> bool:
    """Whether what takes the kernel's place may well be the faster one: a choice like another, not a loss. Stock MLX for
    many rows may be, and the separate kernels that a fused one replaces."""
    return question.startswith(FUSED) or any(f" m{m} " in question for m in BUCKETS if m > ROWS)


def seconds(label: str, chain: Chain) -> float:
    """Least time of one call in seconds: chain(n) is the end of n calls, each of which waits for the one before.

    The least of some, since what else the machine does only ever adds. The graph is built before the clock starts: a
    decoder builds it once for many tokens.
    """
    del label
    mx.eval(chain(2))  # compiles
    calls = _CALLS[0]
    one = _evaluated(chain(calls)) / calls
    calls = int(min(max(_BUDGET / _REPEATS / max(one, 1e-7), calls), _CALLS[1]))
    return min(_evaluated(chain(calls)) / calls for _ in range(_REPEATS))


def _evaluated(y: mx.array) -> float:
    started = time.perf_counter()
    mx.eval(y)
    return time.perf_counter() - started


def instead(question: str) -> str:
    """What takes the place of a kernel that is off."""
    return "our separate kernels" if question.startswith(FUSED) else "stock MLX"


class Tried(NamedTuple):
    """A candidate, what its check found, and its time in microseconds if it could be timed."""

    candidate: Candidate
    verdict: check.Verdict
    time: float | None = None


class Arrays(NamedTuple):
    """A product on the device. words: copies to take in turn. arranged: the same as stock MLX reads them."""

    words: list[mx.array]
    arranged: list[mx.array]
    scale: mx.array
    s: mx.array
    residual: mx.array
    q: mx.array


class Tuner:
    """Answers which kernel multiplies a shape best. runner: runs a launch. timer: seconds of a call."""

    def __init__(
        self, platform: Platform, runner: Runner, timer: Timer = seconds, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.platform: Platform = platform
        self.runner, self.timer, self.clock = runner, timer, clock
        self.stock = StockOps()
        self.thrifty = platform == _THRIFTY

    def product(self, product: Product) -> Choice:
        """The fastest sound kernel, if it is faster than stock MLX in float32, which is as exact."""
        options = candidates(self.platform, product.n, product.k, product.m)
        if not options:
            return Choice(None, "there is no kernel for this shape")
        data = product_data(product)
        small = checkable(product, data)
        arrays = on_device(product, data)
        stock, record = self.stock_times(product, arrays)
        tried = self._confirmed(product, small, self._tried(product, options, data, small, arrays))
        return _chosen(tried, stock, record)

    def stock_times(self, product: Product, arrays: Arrays) -> tuple[float | None, float | None]:
        """Microseconds of a call of stock MLX in float32 and in bfloat16; None for one that fails here."""
        return (
            self._time("stock float32", lambda calls: stock_chain(self.stock, arrays, product, calls)),
            self._time("stock bfloat16", lambda calls: bfloat16_chain(arrays, product, calls)),
        )

    def _time(self, label: str, chain: Chain) -> float | None:
        try:
            return self.timer(label, chain) * 1e6
        except check.FAILURES as error:
            _log.debug("[kernels] %s cannot be timed: %s", label, check.first_line(error))
            return None

    def verdict(self, product: Product, candidate: Candidate, data: ProductData) -> check.Verdict:
        """A candidate against the reference: with and without a residual, and in float32, which shows every integer whole."""
        found = self._quick(product, candidate, data) + self._rest(product, candidate, data)
        return found + check.product(candidate, data, "float32", self.runner, _PLAIN) if self.thrifty else found

    def _quick(self, product: Product, candidate: Candidate, data: ProductData) -> check.Verdict:
        """The part of the verdict that every candidate needs; each part is a kernel to compile."""
        if self.thrifty:
            return check.product(candidate, data, product.dtype, self.runner, _ADDED)
        whole = check.product(candidate, data, "float32", self.runner, _PLAIN)
        return whole + check.product(candidate, data, product.dtype, self.runner, _ADDED) if whole.sound else whole

    def _rest(self, product: Product, candidate: Candidate, data: ProductData) -> check.Verdict:
        if product.dtype == "float32":
            return check.Verdict(0)
        return check.product(candidate, data, product.dtype, self.runner, _PLAIN)

    def measured(
        self, product: Product, candidate: Candidate, data: ProductData, arrays: Arrays
    ) -> tuple[check.Verdict, float | None]:
        """All outputs compared with stock MLX's, and microseconds of a call if they are equal."""
        rows = mx.array(prepare(data.q, data.s, candidate.layout))
        chain = kernel_chain(candidate, rows, arrays, product, self.runner)
        verdict = check.guarded(lambda: _same(chain(1), stock_chain(self.stock, arrays, product, 1)))
        return verdict, self._time(candidate.label, chain) if verdict.sound else None

    def checked(self, product: Product, candidate: Candidate) -> Choice:
        """A candidate that won for another number of rows, checked for this one."""
        data = product_data(product)
        verdict = self._quick(product, candidate, data) + self._rest(product, candidate, data)
        if not verdict.sound:
            return Choice(None, f"{candidate.label}: {verdict.text}", fault=True)
        return Choice(candidate.label)

    def row_kernel(self, kernel: RowKernel) -> Choice:
        """Whether a kernel is right, and faster than what takes its place."""
        verdict = kernel.check(self.runner)
        if not verdict.sound:
            return Choice(None, verdict.text, fault=True)
        ours = self._time(kernel.question, lambda calls: kernel.chain(self.runner, calls))
        stock = self._time("stock", lambda calls: kernel.chain(None, calls))
        if slower(ours, stock):
            return Choice(
                None, f"it takes {ours:.1f} us, {instead(kernel.question)} {stock:.1f} us", time=ours, stock=stock
            )
        return Choice("on", time=ours, stock=stock, ties=verdict.ties)

    def _tried(
        self, product: Product, options: list[Candidate], data: ProductData, small: ProductData, arrays: Arrays
    ) -> list[Tried]:
        started = self.clock()
        tried: list[Tried] = []
        for candidate in options:
            if (tried and self.thrifty) or (len(tried) >= _LEAST and self.clock() - started > _PATIENCE):
                break
            verdict = self._quick(product, candidate, small)
            took = None
            if verdict.sound:
                verdict, took = self.measured(product, candidate, data, arrays)
            tried.append(Tried(candidate, verdict, took))
        return tried

    def _confirmed(self, product: Product, data: ProductData, tried: list[Tried]) -> list[Tried]:
        """Whole verdicts from the fastest on, until one is sound; those that are not lose their times."""
        order = sorted(tried, key=lambda t: float("inf") if t.time is None else t.time)
        for i, t in enumerate(order):
            if t.time is None:
                break
            verdict = t.verdict + self._rest(product, t.candidate, data)
            order[i] = Tried(t.candidate, verdict, t.time if verdict.sound else None)
            if verdict.sound:
                break
        return order


def _same(found: mx.array, expected: mx.array) -> check.Verdict:
    return check.Verdict(expected.size, int(np.array((found != expected).sum())))


def slower(ours: float | None, stock: float | None) -> bool:
    """Whether both were measured, and stock MLX is at least as fast."""
    return ours is not None and stock is not None and ours >= stock


def _chosen(tried: list[Tried], stock: float | None, record: float | None) -> Choice:
    best = min((t for t in tried if t.time is not None), key=lambda t: t.time or 0.0, default=None)
    bad = [t for t in tried if t.time is None]
    reason = "; ".join(f"{t.candidate.label}: {t.verdict.text}" for t in bad[:3])
    if best is None:
        return Choice(None, reason, True, None, stock, record)
    if slower(best.time, stock):
        slow = f"{best.candidate.label} takes {best.time:.1f} us, stock MLX in float32 {stock:.1f} us"
        return Choice(None, f"{slow}; {reason}" if bad else slow, bool(bad), best.time, stock, record)
    return Choice(best.candidate.label, reason, bool(bad), best.time, stock, record)


def checkable(product: Product, data: ProductData) -> ProductData:
    """The product's data, or that of fewer rows where numpy would take long over all."""
    return data if product.m <= _CHECKED_ROWS else product_data(replace(product, m=_CHECKED_ROWS))


def on_device(product: Product, data: ProductData) -> Arrays:
    """The arrays that every way to compute a product shares, evaluated."""
    words = mx.array(data.weight.words)
    copies = max(1, min(_COPIES, _ROTATED // words.nbytes))
    rolled = [mx.contiguous(mx.roll(words, i, 0)) for i in range(copies)]
    scale = mx.array(data.weight.scale)
    found = Arrays(
        rolled,
        [StockOps().arrange(w, scale) for w in rolled],
        scale,
        mx.array(data.s),
        mx.array(data.residual).astype(DTYPES[product.dtype]),
        mx.array(data.q.astype("float32")),
    )
    mx.eval(*found)
    return found


def kernel_chain(
    candidate: Candidate, rows: mx.array, arrays: Arrays, product: Product, runner: Runner, bias: mx.array | None = None
) -> Chain:
    """Calls in a row, each added to the result of the one before, as a residual is."""

    def chain(calls: int) -> mx.array:
        y = arrays.residual
        for i in range(calls):
            w = arrays.words[i % len(arrays.words)]
            y = candidate.run(runner, rows, w, arrays.scale, bias, y, dtype=product.dtype)
        return y

    return chain


def stock_chain(
    stock: StockOps, arrays: Arrays, product: Product, calls: int, bias: mx.array | None = None
) -> mx.array:
    """The same by stock MLX in float32: what takes a kernel's place when it is off."""
    codes = Codes(arrays.q, arrays.s[:, None], DTYPES[product.dtype])
    y = arrays.residual
    for i in range(calls):
        y = stock.linear(codes, arrays.arranged[i % len(arrays.arranged)], arrays.scale, bias, y)
    return y


def bfloat16_chain(arrays: Arrays, product: Product, calls: int) -> mx.array:
    """Stock MLX as a user of plain MLX runs it: bfloat16 through and through, which rounds sums. For the record."""
    n, k = product.n, product.k
    width = arrays.words[0].shape[1] * 16
    x = mx.pad(arrays.q.astype(mx.bfloat16), [(0, 0), (0, width - k)])
    unit = mx.ones((n, width // GROUP), mx.bfloat16)
    y = arrays.residual.astype(mx.bfloat16)
    for i in range(calls):
        w = arrays.words[i % len(arrays.words)]
        y = y + mx.quantized_matmul(x, w, unit, -unit, transpose=True, group_size=GROUP, bits=2)
    return y
