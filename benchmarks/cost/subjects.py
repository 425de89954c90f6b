"""The mat-vecs that are compared: ours in every variant, stock MLX's and mlx-lm's, and what one pass of each loop does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from benchmarks.cost import texts
from bitnet_mlx.backends.kernels import matvec, trits
from bitnet_mlx.backends.kernels.launch import Launch
from bitnet_mlx.backends.kernels.layout import LANES, Layout, halves

N, K = 2560, 2560  # of the launches: sizes come at run time, so the text does not depend on them
GROUP_SCALES = 4 / 128  # bytes a weight of float32 scales in groups of 128


@dataclass(frozen=True)
class Subject:
    """name: ours, or whose. text: makes the kernel's text. m: rows of activations. rows: of the weight, a simdgroup's.

    along: weights of a row that a lane meets in one pass of the inner loop. bytes: of memory for a weight. tail: whether
    it has code outside of the loop for a K that its blocks do not divide, so that what stands there is not what runs.
    """

    name: str
    text: Callable[[], texts.Text]
    m: int
    rows: int
    along: int
    bytes: float
    tail: bool = False

    @property
    def weights(self) -> int:
        """Weights that a lane meets in one pass; each wants a product and a sum for each row of activations."""
        return self.rows * self.along


def subjects() -> Iterator[Subject]:
    """All of them: ours first."""
    for rows in (1, 2, 4, 8):
        yield words2(rows)
    for m in (2, 4, 8):
        yield words2(4, m)
    yield words2(4, words=2)
    yield words2(4, words=4)
    yield words2(4, grouped=True)
    for rows in (1, 2, 4, 8):
        yield trits5(rows)
    for m in (2, 4, 8):
        yield trits5(4, m)
    for dtype in ("float16", "bfloat16"):
        yield float16(4, dtype)
    yield from stock()
    yield mlx_lm()


def words2(rows: int, m: int = 1, words: int = 1, grouped: bool = False) -> Subject:
    """Ours, 2-bit codes and int8 activations; rows of the weight a simdgroup, words a load."""

    def text() -> texts.Text:
        w = np.zeros((N, K // 16), np.uint32)
        scale = np.zeros((N, K // 128) if grouped else N, np.float32)
        xq, xb, s = np.zeros((m, K), np.float16), np.zeros((m, 2 * LANES), np.float32), np.zeros(m, np.float32)
        variant = matvec.MatvecVariant(rows, 2)
        layout = Layout("halves", words)
        return texts.ours(matvec.matvec(xq, xb, s, w, scale, layout=layout, variant=variant, dtype="bfloat16"))

    name = f"words2 R={rows}" + (f" W={words}" if words > 1 else "") + (" groups" if grouped else "")
    return Subject(name, text, m, rows, 16 * words, 0.25 + (GROUP_SCALES if grouped else 0))


def trits5(rows: int, m: int = 1) -> Subject:
    """Ours, base 3 bytes and int8 activations."""

    def text() -> texts.Text:
        w, scale = np.zeros((N, K // 20), np.uint32), np.zeros(N, np.float32)
        xq, xb, s = np.zeros((m, K), np.float16), np.zeros((m, 1), np.float32), np.zeros(m, np.float32)
        launch: Launch = trits.trits_matvec(xq, xb, s, w, scale, variant=trits.TritsVariant(rows, 2), dtype="bfloat16")
        return texts.ours(launch)

    return Subject(f"trits5 R={rows}", text, m, rows, 20, 0.2)


def float16(rows: int, dtype: str) -> Subject:
    """Ours, 2-bit codes and 16-bit activations."""

    def text() -> texts.Text:
        w, scale, x = np.zeros((N, K // 16), np.uint32), np.zeros(N, np.float32), texts.zeros((1, K), dtype)
        variant = matvec.MatvecVariant(rows, 2)
        return texts.ours(matvec.float_matvec(x, w, scale, variant=variant, dtype=dtype))

    return Subject(f"words2 A16 {dtype} R={rows}", text, 1, rows, 16 * halves(K).words, 0.25)


def stock() -> Iterator[Subject]:
    """MLX's own 2-bit mat-vec; four rows and 16 weights of each a pass. float32 is as exact as ours, 16 bits are not."""
    for dtype, size in (("float16", 2), ("float32", 4)):

        def text(dtype: str = dtype) -> texts.Text:
            return texts.stock_qmv("half" if dtype == "float16" else "float")

        yield Subject(f"MLX qmv_fast 2 bits, {dtype}", text, 1, 4, 16, 0.25 + 2 * size / 128, tail=True)


def mlx_lm() -> Subject:
    """mlx-lm's BitLinear: four weights of each byte, four bytes a pass."""
    return Subject("mlx-lm BitLinear, float16", texts.mlx_lm, 1, 4, 4, 0.25)
