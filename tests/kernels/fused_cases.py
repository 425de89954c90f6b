"""Rows for the mat-vec that quantises its own row, and the outputs of plain arithmetic for them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from bitnet_mlx.backends.kernels.fused import FusedVariant, fused_matvec, variants
from bitnet_mlx.backends.kernels.launch import Launch
from bitnet_mlx.formats import words2
from tests.backend.shapes import outputs
from tests.kernels.quantize_cases import DTYPES, codes, rows_of


@dataclass(frozen=True)
class FusedCase:
    """One launch for each row. extras: how many of bias and residual there are. form: None for the first of variants."""

    n: int
    k: int
    form: FusedVariant | None = None
    dtype: str = "bfloat16"
    norm: bool = True
    act: str | None = None
    scale: str = "tensor"
    extras: int = 0
    eps: float = 1e-5

    def launch(self, row: int) -> Launch:
        x, weight, _ = rows_of(self.dtype, self.act, self.k)
        _, words, scale, bias, residual = self._arrays()
        return fused_matvec(
            x[row : row + 1], weight if self.norm else None, words, scale, bias, residual,
            variant=self.form or variants(self.n, self.k, self.norm)[0], dtype=self.dtype, eps=self.eps, act=self.act,
        )  # fmt: skip

    def expected(self, row: int) -> np.ndarray:
        """[1, N] of the dtype."""
        return _expected(self)[row : row + 1]

    def all_expected(self) -> np.ndarray:
        """[17, N]."""
        t, _, scale, bias, residual = self._arrays()
        q, s = codes(self.dtype, self.act, self.norm, self.eps, self.k)
        acc = (q.astype(np.float32) @ t.T.astype(np.float32)).astype(np.int64)  # whole numbers below 2^24: exact
        with np.errstate(over="ignore"):
            y = outputs(acc[:, None], s, scale, bias).astype(DTYPES[self.dtype])
            if residual is None:
                return y
            return (residual.astype(np.float32) + y.astype(np.float32)).astype(DTYPES[self.dtype])

    def _arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
        return _weights(self.n, self.k, self.scale, self.extras, self.dtype)


@lru_cache(maxsize=4)
def _expected(case: FusedCase) -> np.ndarray:
    return case.all_expected()


@lru_cache(maxsize=4)
def _weights(
    n: int, k: int, scale: str, extras: int, dtype: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
    """(t int8 [N, K], its words, scale, bias, residual)."""
    rng = np.random.default_rng((n, k, extras))
    t = rng.integers(-1, 2, (n, k)).astype(np.int8)
    t[::5], t[3::7] = 1, -1
    size = () if scale == "tensor" else (n,)
    factors = np.asarray(np.exp(rng.uniform(-3, 0, size)), np.float32)
    bias = rng.standard_normal(n).astype(np.float32) if extras > 0 else None
    residual = rng.standard_normal((1, n)).astype(DTYPES[dtype]) if extras > 1 else None
    return t, words2.pack(t), factors, bias, residual


CASES = [
    FusedCase(33, 2560, FusedVariant(16, 1, 2, 5, 10), extras=2),
    FusedCase(35, 2560, FusedVariant(16, 2, 2, 5, 8)),
    FusedCase(129, 2560, FusedVariant(16, 4, 2, 5, 14), scale="row"),
    FusedCase(33, 6912, FusedVariant(32, 2, 2, 7, 10), act="relu2", extras=2),
    FusedCase(5, 6912, FusedVariant(16, 1, 4, 3, 10), "float32", act="silu", norm=False),
    FusedCase(3, 10, dtype="float32", scale="row", extras=1),
    FusedCase(64, 100, FusedVariant(8, 4, 1, 1, 4), "float16", norm=False, extras=2),
    FusedCase(1, 8, dtype="float32", norm=False),
    FusedCase(33, 128, FusedVariant(16, 1, 2, 1, 4), "float16", act="silu", scale="row"),
    FusedCase(5, 1036, FusedVariant(8, 1, 2, 2, 4), "float32"),
    FusedCase(7, 600, FusedVariant(32, 4, 4, 1, 3), "float32", act="relu2", eps=1e-6),
]
