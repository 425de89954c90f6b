"""The layouts in MLX operations equal their definition in numpy, for every width that leaves words or lanes over."""

from __future__ import annotations

import numpy as np
import pytest

from bitnet_mlx.backends.kernels.layout import KINDS, Layout, halves, prepare
from bitnet_mlx.backends.kernels.layout_mlx import prepare_mlx, scales_mlx
from bitnet_mlx.backends.mlx_import import mx
from tests.backend.shapes import codes, same


@pytest.mark.parametrize("k", [8, 10, 100, 128, 2560, 6912])
def test_equals_the_definition(k: int) -> None:
    q = codes(np.random.default_rng(k), k)
    s = np.exp(np.random.default_rng(k).uniform(-9, 16, 17)).astype(np.float32)
    for layout in (*map(Layout, KINDS), Layout("halves", 2), Layout("halves", 4), halves(k)):
        for rows in (1, 3, 17):
            prepared = prepare_mlx(mx.array(q[:rows].astype(np.float32)), mx.array(s[:rows]), layout)
            expected = prepare(q[:rows], s[:rows], layout)
            assert np.array(prepared).dtype == expected.dtype
            same(np.array(prepared), expected, f"{layout}, K {k}, M {rows}")
            same(np.array(scales_mlx(prepared, layout, k))[:, 0], s[:rows], f"scales of {layout}, K {k}, M {rows}")
