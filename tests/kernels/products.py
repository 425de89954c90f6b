"""Data and expected outputs for every kernel of a ternary product, from plain integer arithmetic (tests/backend/shapes.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from bitnet_mlx.backends.kernels.layout import Layout, prepare
from bitnet_mlx.formats import words2
from tests.backend import shapes

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@dataclass(frozen=True)
class Product:
    """q int8 [M, K], s [M]; t int8 [N, K] and its words; scale, bias, residual; y the expected output, of a dtype."""

    q: np.ndarray
    s: np.ndarray
    t: np.ndarray
    words: np.ndarray
    scale: np.ndarray
    bias: np.ndarray | None
    residual: np.ndarray | None
    y: np.ndarray

    def rows(self, layout: Layout) -> np.ndarray:
        """The activations as a kernel reads them."""
        return prepare(self.q, self.s, layout)


def product(
    m: int,
    n: int,
    k: int,
    *,
    scale: str = "tensor",
    bias: bool = False,
    residual: bool = False,
    dtype: str = "float32",
    plain: bool = False,
) -> Product:
    """A seeded case with rows of extremes on both sides. plain: s and scale are 1, so float32 outputs are the accumulators."""
    rng = np.random.default_rng((m, n, k))
    t = rng.integers(-1, 2, (n, k)).astype(np.int8)
    t[::5], t[3::7] = 1, -1
    q = rng.integers(-128, 128, (m, k)).astype(np.int8)
    q[1::4], q[2::8], q[5::8] = -128, 127, 0
    size = {"tensor": (), "row": (n,), "group": (n, -(-k // shapes.GROUP))}[scale]
    low = 0 if dtype == "float16" else -9  # float16 ends at 65504
    s = np.ones(m, np.float32) if plain else np.exp(rng.uniform(low, 16, m)).astype(np.float32)
    scales = np.asarray(np.ones(size) if plain else np.exp(rng.uniform(-8, -2 if low == 0 else 2, size)), np.float32)
    wide, across = q.astype(np.float64), t.astype(np.float64)
    parts = [wide[:, at : at + shapes.GROUP] @ across[:, at : at + shapes.GROUP].T for at in range(0, k, shapes.GROUP)]
    added = rng.standard_normal(n).astype(np.float32) if bias else None
    out = shapes.outputs(np.stack(parts, axis=1).astype(np.int64), s, scales, added).astype(DTYPES[dtype])
    rest: Any = None
    if residual:
        rest = rng.standard_normal((m, n)).astype(DTYPES[dtype])
        out = (rest.astype(np.float32) + out.astype(np.float32)).astype(DTYPES[dtype])
    return Product(q, s, t, words2.pack(t), scales, added, rest, out)
