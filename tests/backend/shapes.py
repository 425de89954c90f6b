"""Shapes and data on which every backend must give the integers, outputs and codes of plain arithmetic.

A backend's test calls `check_products(n, k, backend)` for each of `PAIRS` and `check_codes(k, quantize)` for each K.
The expected values use none of the package's arithmetic: whole-number products in float64, and float64 operations each
rounded to float32
(float64 has more than twice float32's bits, so that is the correctly rounded float32 result).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Protocol

import numpy as np

from bitnet_mlx.formats import words2
from bitnet_mlx.ternary import TernaryTensor

M = (1, 2, 3, 8, 9, 17)  # one row, and each side of the usual tile heights 2, 8 and 16
N = (1, 3, 5, 33, 64, 129, 2560)
K = (8, 10, 100, 128, 2560, 6912)  # below a group, a ragged word, one whole group, the 2B model's widths
PAIRS = [(n, k) for n in N for k in K]
SCALES = ("tensor", "row", "group")
ROWS = max(M)
GROUP = 128


class Backend(Protocol):
    """What is checked; numpy arrays in and out."""

    def accumulate(self, q: np.ndarray, weight: TernaryTensor, /) -> np.ndarray:
        """int8 [M, K] -> whole numbers of any dtype, [M, N] or, with scales in groups, [M, G, N]."""
        ...

    def linear(self, q: np.ndarray, s: np.ndarray, weight: TernaryTensor, bias: np.ndarray | None, /) -> np.ndarray:
        """int8 [M, K] and float32 [M] -> float32 [M, N]."""
        ...


def codes(rng: np.random.Generator, k: int) -> np.ndarray:
    """int8 [17, K]: random codes over the whole range, with -128, and rows of one value: the extremes, 0 and 1."""
    q = rng.integers(-128, 128, (ROWS, k)).astype(np.int8)
    q[1::4], q[2::8], q[3::8], q[6], q[7] = -128, 127, 0, 1, np.where(np.arange(k) % 2, 127, -128)
    return q


@lru_cache(maxsize=2)
def _weights(n: int, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(t int8 [N, K], q int8 [17, K], their integer products by groups of 128 along K [17, G, N])."""
    rng = np.random.default_rng((n, k))
    t = rng.integers(-1, 2, (n, k)).astype(np.int8)
    t[::5], t[3::7] = 1, -1  # whole rows of one value: the largest accumulators
    q = np.roll(codes(rng, k), n + k, axis=0)  # so that M = 1 meets another kind of row at each shape
    wide, across = q.astype(np.float64), t.astype(np.float64)  # whole numbers far below 2^53: exact, and fast
    parts = [wide[:, at : at + GROUP] @ across[:, at : at + GROUP].T for at in range(0, k, GROUP)]
    return t, q, np.stack(parts, axis=1).astype(np.int64)


def f32(x: np.ndarray) -> np.ndarray:
    """Round float64 to float32, still held as float64."""
    return x.astype(np.float32).astype(np.float64)


def outputs(parts: np.ndarray, s: np.ndarray, scale: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """float32 outputs of int64 products [M, G, N]: (acc / s) * scale, groups added in ascending order, then bias."""
    s = s.astype(np.float64)[:, None]
    if scale.ndim < 2:
        y = f32(f32(parts.sum(axis=1) / s) * scale.astype(np.float64))
    else:
        y = np.zeros((len(parts), parts.shape[2]))
        for g in range(parts.shape[1]):
            y = f32(y + f32(f32(parts[:, g] / s) * scale[:, g].astype(np.float64)))
    return (y if bias is None else f32(y + bias.astype(np.float64))).astype(np.float32)


def check_products(
    n: int, k: int, backend: Backend, ms: tuple[int, ...] = M, kinds: tuple[str, ...] = SCALES, added: bool = False
) -> None:
    """Every M and kind of scale, every other with a bias: equal accumulators, outputs equal to the last bit.

    ms, kinds: the M and the kinds of scale to check. added: the backend adds the accumulators of groups up, [M, N].
    """
    t, q, parts = _weights(n, k)
    rng = np.random.default_rng((n, k, 1))
    s = np.exp(rng.uniform(-9, 16, ROWS)).astype(np.float32)
    bias = rng.standard_normal(n).astype(np.float32)
    words = words2.pack(t)
    for kind in kinds:
        shape = {"tensor": (), "row": (n,), "group": (n, parts.shape[1])}[kind]
        weight = TernaryTensor(words, np.asarray(np.exp(rng.uniform(-8, 2, shape)), np.float32), (n, k))
        for i, m in enumerate(ms):
            b = bias if (i + n + k + len(kind)) % 2 else None
            label = f"M {m}, N {n}, K {k}, scale by {kind}, {'no bias' if b is None else 'bias'}"
            integers = parts[:m] if kind == "group" and not added else parts[:m].sum(axis=1)
            same(backend.accumulate(q[:m], weight), integers, f"accumulators, {label}")
            expected = outputs(parts[:m], s[:m], weight.scale, b)
            same(backend.linear(q[:m], s[:m], weight, b), expected, f"outputs, {label}")


def inputs(k: int) -> np.ndarray:
    """float32 [17, K]: every kind of row that a quantiser can meet."""
    rng = np.random.default_rng(k)
    x = rng.standard_normal((ROWS, k)).astype(np.float32)
    x[1] = 0
    x[2] = np.float32(0.37)  # one value
    x[3] = np.float32(-2.5)
    x[4], x[5] = ties(rng, k), ties(rng, k) * np.float32(2.0**-20)
    x[6, k // 2] = 1e4  # one outlier: all else rounds to 0, or nearly
    x[7] *= np.float32(1e-8)  # below the quantiser's floor of 1e-5
    x[8] = np.where(np.arange(k) % 2, 1, -1) * np.float32(1e-5)  # at the floor
    x[9] *= np.float32(1e15)
    x[10] = -np.abs(x[10])
    x[11:] *= np.float32(10.0) ** np.arange(-3, 3, dtype=np.float32)[:, None]
    return x


def ties(rng: np.random.Generator, k: int) -> np.ndarray:
    """A row whose codes all fall half way between two integers, but for one of 127: the scale is then exactly 1."""
    row = (rng.integers(-127, 127, k) + 0.5).astype(np.float32)
    row[int(rng.integers(k))] = 127
    return row


def half_even(v: np.ndarray) -> np.ndarray:
    """Round to the nearest integer, half to even, by comparison alone."""
    low = np.floor(v)
    rest = v - low
    return low + ((rest > 0.5) | ((rest == 0.5) & (low % 2 == 1)))


def expected_codes(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(q int8 [M, K], s float32 [M]) of float32 x [M, K]."""
    top = np.maximum(np.abs(x).max(axis=1), np.float32(1e-5)).astype(np.float64)
    s = f32(127 / top)
    q = np.clip(half_even(f32(x.astype(np.float64) * s[:, None])), -128, 127)
    return q.astype(np.int8), s.astype(np.float32)


def check_codes(k: int, quantize: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]) -> None:
    """quantize(x float32 [M, K]) -> (q int8 [M, K], s float32 [M]) gives equal codes and equal scales for every M."""
    x = np.roll(inputs(k), k, axis=0)
    q, s = expected_codes(x)
    for m in M:
        found_q, found_s = quantize(x[:m])
        same(found_s, s[:m], f"activation scales, M {m}, K {k}")
        same(found_q, q[:m], f"codes, M {m}, K {k}")


def same(found: np.ndarray, expected: np.ndarray, label: str) -> None:
    """Fail, naming the worst element, unless the two arrays have equal shapes and equal values."""
    found = np.asarray(found)
    assert found.shape == expected.shape, f"{label}: shape {found.shape}, expected {expected.shape}"
    if not np.array_equal(found, expected):
        difference = np.abs(found.astype(np.float64) - expected.astype(np.float64))
        at = np.unravel_index(int(np.nanargmax(np.where(np.isnan(difference), np.inf, difference))), difference.shape)
        wrong = int((found != expected).sum())
        index = tuple(int(i) for i in at)
        raise AssertionError(f"{label}: {wrong} differ, the worst at {index}: {found[at]!r}, expected {expected[at]!r}")
