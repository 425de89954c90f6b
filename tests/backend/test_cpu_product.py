"""The ternary product of each body that this processor runs, against integer arithmetic in numpy."""

from __future__ import annotations

import numba
import numpy as np
import pytest

from bitnet_mlx.backends.cpu_jit import isa
from bitnet_mlx.backends.cpu_jit.product import BLOCK, PANEL, panel_intrinsic, row_intrinsic
from bitnet_mlx.formats import words2
from bitnet_mlx.ternary import padded


def planes(q: np.ndarray, tokens: int) -> np.ndarray:
    """int8 [M, K] -> [ceil(M / tokens), blocks, tokens, 4, 32]."""
    m, k = q.shape
    wide = np.zeros((-(-m // tokens) * tokens, padded(k)), np.int8)
    wide[:m, :k] = q
    blocks = padded(k) // BLOCK
    return np.ascontiguousarray(wide.reshape(-1, tokens, blocks, 32, 4).transpose(0, 2, 1, 4, 3))


@pytest.fixture(scope="module", params=isa.runnable())
def kernels(request: pytest.FixtureRequest):
    body = isa.body(request.param)
    row = row_intrinsic(lambda: body)
    panel, four, two = (panel_intrinsic(lambda: body, tokens) for tokens in (PANEL, 4, 2))

    @numba.njit
    def rows(w, n, stride, x, blocks, out):
        for r in range(n):
            out[r] = row(w + r * stride, x, blocks)

    @numba.njit
    def panels(w, n, stride, x, blocks, out_at, tokens):
        for r in range(n):
            if tokens == PANEL:
                panel(w + r * stride, x, blocks, out_at + r * 4 * PANEL)
            elif tokens == 4:
                four(w + r * stride, x, blocks, out_at + r * 4 * PANEL)
            else:
                two(w + r * stride, x, blocks, out_at + r * 4 * PANEL)

    return rows, panels


SHAPES = [(1, 8), (3, 100), (5, 128), (33, 129), (4, 2048), (3, 2049), (2, 2560), (7, 6912)]


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_products_equal_integers(kernels, n: int, k: int) -> None:
    rows, panels = kernels
    rng = np.random.default_rng(n * k)
    t = rng.integers(-1, 2, (n, k)).astype(np.int8)
    t[0] = 1  # the largest sums, which the narrow lanes must hold
    if n > 1:
        t[1] = -1
    q = rng.integers(-128, 128, (PANEL, k)).astype(np.int8)
    q[0], q[1] = 127, -128
    words = words2.pack(t)
    want = q.astype(np.int64) @ t.astype(np.int64).T + q.sum(1, dtype=np.int64)[:, None]  # codes are t + 1
    stride, blocks = words.shape[1] * 4, padded(k) // BLOCK
    single = planes(q, 1)
    for m in range(PANEL):
        out = np.zeros(n, np.int32)
        rows(words.ctypes.data, n, stride, single[m].ctypes.data, blocks, out)
        assert np.array_equal(out, want[m])
    panel = planes(q, PANEL)
    for tokens in (2, 4, PANEL):
        found = np.full((n, PANEL), 5, np.int32)
        panels(words.ctypes.data, n, stride, panel.ctypes.data, blocks, found.ctypes.data, tokens)
        assert np.array_equal(found.T[:tokens], want[:tokens] + 5) and (found.T[tokens:] == 5).all()


def test_rows_at_odd_addresses(kernels) -> None:
    rows, _ = kernels
    rng = np.random.default_rng(3)
    t = rng.integers(-1, 2, (4, 384)).astype(np.int8)
    words = words2.pack(t)
    room = np.zeros(words.nbytes + 1, np.uint8)
    room[1:] = words.view(np.uint8).reshape(-1)
    q = rng.integers(-128, 128, (1, 384)).astype(np.int8)
    x = planes(q, 1)
    out = np.zeros(4, np.int32)
    rows(room.ctypes.data + 1, 4, words.shape[1] * 4, x.ctypes.data, 3, out)
    assert np.array_equal(out, (t.astype(np.int64) + 1) @ q[0].astype(np.int64))
