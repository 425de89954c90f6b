"""Which kernels can compute an exact ternary product on a platform, in which variants, and how one of them is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

from bitnet_mlx.backends.kernels import dp4a, matmul, matvec
from bitnet_mlx.backends.kernels.launch import Launch
from bitnet_mlx.backends.kernels.layout import LANES, Layout, halves
from bitnet_mlx.backends.kernels.source import Platform
from bitnet_mlx.backends.mlx_import import mx
from bitnet_mlx.ternary import CODES_PER_WORD, padded

Runner = Callable[[Launch], list[mx.array]]
ROWS = 8  # the most rows of activations that one mat-vec takes
_BYTES, _PLAIN = Layout("bytes"), Layout("plain")


@dataclass(frozen=True)
class Candidate:
    """One kernel in one variant. layout: of the activations that it reads. rows: how many one launch takes at most."""

    family: str
    layout: Layout
    variant: Any
    make: Callable[..., Launch]
    rows: int | None = ROWS

    @property
    def label(self) -> str:
        """Names the candidate among all for a product, in the file of choices and in doctor."""
        values = ", ".join(f"{f.name}={getattr(self.variant, f.name)}" for f in fields(self.variant))
        pieces = "" if self.rows != ROWS else f" of {ROWS} rows at most"
        return f"{self.family}({values}) on {self.layout.kind}{pieces}"

    def run(
        self,
        runner: Runner,
        x: Any,
        words: Any,
        scale: Any,
        bias: Any | None = None,
        residual: Any | None = None,
        *,
        dtype: str,
    ) -> mx.array:
        """x: rows of activations, uint32 [M, stride], in this layout -> [M, N] of dtype; more rows go in pieces."""
        m = x.shape[0]
        step = self.rows or m
        parts = []
        for at in range(0, m, step):
            piece = x if m <= step else x[at : at + step]
            added = residual if residual is None or m <= step else residual[at : at + step]
            parts += runner(self.make(piece, words, scale, bias, added, variant=self.variant, dtype=dtype))
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=0)


def candidates(platform: Platform, n: int, k: int, m: int) -> list[Candidate]:
    """Everything worth trying for M rows and a weight [N, K], the likely best first. May be empty."""
    if m <= ROWS:
        return list(_vectors(platform, n, k, m))
    whole = [
        Candidate("matmul", _matrix_layout(platform), variant, _matmul(platform), None)
        for variant in matmul.variants(n, k, m, platform)
    ]
    pieces = list(_vectors(platform, n, k, ROWS))[:2] if m <= 8 * ROWS else []
    return whole + pieces


def layouts(platform: Platform, k: int) -> list[Layout]:
    """Every layout that a product of this K may ask for."""
    vector = [halves(k)] if platform == "metal" and half_exact(k) else []
    return [*vector, _matrix_layout(platform)]


def half_exact(k: int) -> bool:
    """Whether no lane of the half-mantissa mat-vec sums so many words of a row that a sum could round."""
    words, layout = padded(k) // CODES_PER_WORD, halves(k)
    return -(-words // (layout.words * LANES)) * layout.words <= matvec.LANE_WORDS


def find(platform: Platform, n: int, k: int, m: int, label: str) -> Candidate | None:
    """The candidate of that label; None for a label of other times."""
    return next((c for c in candidates(platform, n, k, m) if c.label == label), None)


def _vectors(platform: Platform, n: int, k: int, m: int) -> Iterator[Candidate]:
    """On CUDA dp4a alone: on an H100 it took half the time of the half-mantissa form, or less, at every shape measured."""
    if platform == "cuda":
        yield from (Candidate("dp4a", _BYTES, v, dp4a.dp4a_matvec) for v in dp4a.variants(n, k, m))
    elif half_exact(k):
        layout = halves(k)
        yield from (Candidate("matvec", layout, v, _matvec(layout)) for v in matvec.variants(n, k, m))


def _matrix_layout(platform: Platform) -> Layout:
    return _PLAIN if platform == "metal" else _BYTES


@lru_cache(maxsize=8)
def _matvec(layout: Layout) -> Callable[..., Launch]:
    def make(*arrays: Any, variant: Any, dtype: str) -> Launch:
        return matvec.matvec(*arrays, layout=layout, variant=variant, dtype=dtype)

    return make


@lru_cache(maxsize=2)
def _matmul(platform: Platform) -> Callable[..., Launch]:
    layout = _matrix_layout(platform)

    def make(*arrays: Any, variant: Any, dtype: str) -> Launch:
        return matmul.matmul(*arrays, layout=layout, variant=variant, dtype=dtype)

    return make
