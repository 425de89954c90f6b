"""What an adapter (LoRA, or DoRA) adds to a frozen linear, and what the two make together.

y = gain * (x W^T + scale * (x A) B) + bias; the gain is DoRA's m / |W + scale * (A B)^T| of each row, and absent in LoRA.
x is the linear's input as floats: behind the layer's norm, before any quantiser and before a norm of the linear's own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from bitnet_mlx.ternary import matmul

_ROWS = 512  # rows of W widened at a time


class Rows(Protocol):
    """A matrix of any storage."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def rows(self, index: np.ndarray | slice) -> np.ndarray:
        """The chosen rows, float32 [.., K]."""
        ...


@dataclass(frozen=True)
class LowRank:
    """An adapter's part for one linear of N outputs and K inputs, by mlx-lm's names and shapes.

    a: float32 [K, r]. b: float32 [r, N]. m: float32 [N], DoRA's magnitudes, or None. gain: float32 [N], what follows from
    m and the linear's weight (see `for_weight`).
    """

    a: np.ndarray
    b: np.ndarray
    scale: float
    m: np.ndarray | None = None
    gain: np.ndarray | None = field(default=None, repr=False)

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that run."""
        return self.a.nbytes + self.b.nbytes + (0 if self.gain is None else self.gain.nbytes)

    def delta(self, rows: slice) -> np.ndarray:
        """scale * (A B)^T of some rows of W: float64 [n, K]."""
        return np.float64(self.scale) * matmul(self.b[:, rows].astype(np.float64).T, self.a.astype(np.float64).T)

    def for_weight(self, weight: Rows) -> LowRank:
        """The same with the gain that belongs to the linear's weight. The norms are taken in float64."""
        if self.m is None:
            return self
        norms = [np.sqrt(np.square(weight.rows(part) + self.delta(part)).sum(axis=1)) for part in blocks(weight)]
        # A row of zeros that nothing was added to has norm 0 and m = 0; it stays 0.
        gain = self.m.astype(np.float64) / np.maximum(np.concatenate(norms), 1e-12)
        return LowRank(self.a, self.b, self.scale, self.m, gain.astype(np.float32))

    def fused(self, weight: Rows, rows: slice) -> np.ndarray:
        """The rows of the weight that stands for both: float32 [n, K], computed in float64 and rounded once."""
        w = weight.rows(rows).astype(np.float64) + self.delta(rows)
        return (w if self.gain is None else self.gain[rows, None] * w).astype(np.float32)


@dataclass(frozen=True)
class FusedRows:
    """A weight with its adapter's part, row by row when asked for."""

    weight: Rows
    part: LowRank

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.weight.shape

    def rows(self, index: slice) -> np.ndarray:
        """float32 [n, K]."""
        return self.part.fused(self.weight, index)


def blocks(weight: Rows) -> list[slice]:
    """Slices of some rows that cover a matrix."""
    n = weight.shape[0]
    return [slice(at, min(at + _ROWS, n)) for at in range(0, n, _ROWS)]
