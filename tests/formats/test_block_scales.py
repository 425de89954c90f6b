"""Scales of blocks to the scale of a tensor: every weight keeps its value, and one scale stays one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_mlx.errors import FormatError, UnsupportedModelError
from bitnet_mlx.formats import words2
from bitnet_mlx.formats.block_scales import collapse
from bitnet_mlx.ternary import TernaryTensor


def ternary(rng: np.random.Generator, n: int, k: int, block: int, empty: float) -> np.ndarray:
    t = rng.integers(-1, 2, (n, k)).astype(np.int8)
    return t * np.repeat(rng.random((n, k // block)) >= empty, block, axis=1)


@settings(deadline=None, max_examples=80, database=None)
@given(
    st.integers(1, 6), st.integers(1, 4), st.sampled_from([64, 128, 256]), st.sampled_from(["one", "row", "block"]),
    st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_every_weight_keeps_its_value(n: int, blocks: int, block: int, kind: str, empty: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    k = blocks * block
    t = ternary(rng, n, k, block, empty)
    d = rng.uniform(0.1, 2, {"one": (1, 1), "row": (n, 1), "block": (n, blocks)}[kind]).astype(np.float32)
    d = np.broadcast_to(d, (n, blocks)).copy()
    if block == 64 and kind == "block":
        d[:, 1::2] = d[:, : blocks - 1 : 2] if blocks > 1 else d[:, 1::2]
    d[~(t.reshape(n, blocks, block) != 0).any(axis=2)] = 0
    words = words2.pack(t)
    tensor = TernaryTensor(words, collapse(d, words, block, "w"), (n, k))
    assert np.array_equal(tensor.rows(slice(None)), t * np.repeat(d, block, axis=1))
    assert np.all(tensor.scale > 0) or tensor.scale.ndim == 2
    if kind == "one":
        assert tensor.scale.ndim == 0
    if kind == "row":
        assert tensor.scale.ndim <= 1


def test_scales_that_are_none_are_refused_with_their_place() -> None:
    t = np.ones((3, 512), np.int8)
    words = words2.pack(t)
    for value in (0, -1, np.nan, np.inf, -np.inf):
        d = np.ones((3, 2), np.float32)
        d[2, 1] = value
        with pytest.raises(FormatError, match="tensor w: the scale of row 2, block 1 is"):
            collapse(d, words, 256, "w")
    t[2, 256:] = 0
    d[2, 1] = -1  # even where no weight counts
    with pytest.raises(FormatError, match="row 2, block 1"):
        collapse(d, words2.pack(t), 256, "w")


def test_two_scales_in_a_group_of_128_are_refused() -> None:
    words = words2.pack(np.ones((2, 256), np.int8))
    with pytest.raises(UnsupportedModelError, match="row 1, columns 128 on"):
        collapse(np.array([[1, 1, 2, 2], [1, 1, 2, 3]], np.float32), words, 64, "w")


def test_half_a_group_of_zeros_has_no_say() -> None:
    t = np.ones((2, 256), np.int8)
    t[0, 192:], t[1, 128:192] = 0, 0
    d = np.array([[1, 1, 2, 0], [1, 1, 5, 3]], np.float32)
    assert collapse(d, words2.pack(t), 64, "w").tolist() == [[1, 2], [1, 3]]
