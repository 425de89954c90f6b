"""Data on which a kernel is checked, and what the reference says about it: everything in numpy.

Random words and activations with the extremes among them: rows of one weight, of one code, -128; rows of zeros, of ties,
of one outlier, below the quantiser's floor. Expected values come from numpy_ref, whose integers are exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bitnet_mlx.backends import numpy_ref
from bitnet_mlx.formats.dense import bfloat16_to_float32, float32_to_bfloat16
from bitnet_mlx.ternary import CODES_PER_WORD, GROUP, ZERO_WORD, TernaryTensor, padded, scale_output

_WHOLE = 1 << 28  # products of M, N and K up to which every output is expected by numpy; beyond, those of some rows
_SOME = 256


@dataclass(frozen=True)
class Product:
    """A ternary product to check: M rows of activations, weight [N, K], scales per "tensor", "row" or "group".

    reach: the largest activation; with 1, sums stay so small that even bfloat16 outputs show them whole.
    """

    n: int
    k: int
    m: int
    scale: str
    dtype: str
    reach: int = 128

    def __str__(self) -> str:
        return f"product {self.n}x{self.k} m{self.m} {self.scale} {self.dtype}"


@dataclass(frozen=True)
class ProductData:
    """q int8 [M, K], s float32 [M]; weight and bias [N]; residual float32 [M, N], representable in the dtype.

    columns: the outputs that `acc` (the integers, [M, n] or [M, G, n]) holds, ascending.
    """

    q: np.ndarray
    s: np.ndarray
    weight: TernaryTensor
    bias: np.ndarray
    residual: np.ndarray
    columns: np.ndarray
    acc: np.ndarray

    def expected(self, dtype: str, biased: bool, added: bool) -> np.ndarray:
        """float32 [M, n], the values of the chosen outputs, with bias and residual as asked."""
        scale = self.weight.scale
        y = scale_output(self.acc, self.s, scale[self.columns] if scale.ndim else scale)
        if biased:
            y = y + self.bias[self.columns]
        y = rounded(y, dtype)
        return rounded(self.residual[:, self.columns] + y, dtype) if added else y


def product_data(product: Product) -> ProductData:
    """Everything about a product; the same for the same product."""
    n, k, m = product.n, product.k, product.m
    rng = np.random.default_rng((n, k, m, product.reach))
    words = random_words(rng, n, k)
    shape = {"tensor": (), "row": (n,), "group": (n, padded(k) // GROUP)}[product.scale]
    scale = np.asarray(np.exp(rng.uniform(-6, 0, shape)), np.float32)
    weight = TernaryTensor(words, scale, (n, k))
    q = (
        random_codes(rng, m, k)
        if product.reach == 128
        else rng.integers(-product.reach, product.reach + 1, (m, k), np.int8)
    )
    s = np.exp(rng.uniform(-3, 6, m)).astype(np.float32)
    bias = rng.standard_normal(n).astype(np.float32)
    residual = rounded(rng.standard_normal((m, n)).astype(np.float32), product.dtype)
    columns = np.arange(n)
    if n * k * m > _WHOLE and n > _SOME:
        some = rng.integers(0, n, _SOME // 2)
        columns = np.unique(np.concatenate([columns[: _SOME // 4], some, columns[-_SOME // 4 :]]))
    chosen = TernaryTensor(words[columns], scale[columns] if scale.ndim else scale, (len(columns), k))
    return ProductData(q, s, weight, bias, residual, columns, numpy_ref.accumulate(q, chosen))


def random_words(rng: np.random.Generator, n: int, k: int) -> np.ndarray:
    """uint32 [N, padded K / 16] in words2, with whole rows of 1 and of -1: the largest sums there are."""
    words = rng.integers(0, 1 << 32, (n, padded(k) // CODES_PER_WORD), np.uint32)
    three = words & words >> np.uint32(1) & ZERO_WORD
    words ^= three << np.uint32(1)  # code 3 becomes 1
    words[::5], words[3::7] = ZERO_WORD << np.uint32(1), 0
    whole, rest = divmod(k, CODES_PER_WORD)
    if rest:
        kept = np.uint32((1 << 2 * rest) - 1)
        words[:, whole] = words[:, whole] & kept | ZERO_WORD & ~kept
        whole += 1
    words[:, whole:] = ZERO_WORD
    return words


def random_codes(rng: np.random.Generator, m: int, k: int) -> np.ndarray:
    """int8 [M, K]: random over the whole range, and rows of one extreme where there are rows enough."""
    q = rng.integers(-128, 128, (m, k)).astype(np.int8)
    q[1::4], q[2::8], q[3::8] = -128, 127, 0
    return q


def activations(k: int, m: int, dtype: str, limit: float = 1e15) -> np.ndarray:
    """float32 [M, K], representable in dtype, none beyond `limit`: every kind of row that a quantiser can meet."""
    rng = np.random.default_rng((k, m))
    x = rng.standard_normal((max(m, 10), k)).astype(np.float32)
    x[1] = 0
    x[2] = np.float32(0.37)
    x[3], x[4] = _ties(rng, k), _ties(rng, k) * np.float32(2.0**-10)
    x[5, k // 2] = 1e4  # one outlier: nearly all else rounds to 0
    x[6] *= np.float32(1e-8)  # below the quantiser's floor
    x[7] = np.where(np.arange(k) % 2, 1, -1) * np.float32(1e-5)  # at it
    x[8] *= np.float32(1e15)
    x[9] = -np.abs(x[9])
    top = min(limit, 6e4) if dtype == "float16" else limit
    return rounded(np.clip(x, -top, top), dtype)[:m]


def _ties(rng: np.random.Generator, k: int) -> np.ndarray:
    """Codes half way between two integers, but for one of 127, so that the scale is exactly 1."""
    row = (rng.integers(-127, 127, k) + 0.5).astype(np.float32)
    row[int(rng.integers(k))] = 127
    return row


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values rounded, half to even, to those of dtype ("float32", "bfloat16", "float16"); still float32."""
    if dtype == "float32":
        return x
    if dtype == "bfloat16":
        return bfloat16_to_float32(float32_to_bfloat16(x))
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float32)
