"""Dense types of ggml: equal to the bit to the package that owns them, on any bytes."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_mlx.errors import FormatError
from bitnet_mlx.formats import ggml_floats

KINDS = (*ggml_floats.PLAIN, *ggml_floats.BLOCKS)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=40, database=None)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_any_bytes_decode_as_the_owner_decodes_them(kind: str, n: int, blocks: int, seed: int) -> None:
    k = blocks * ggml_floats.BLOCKS.get(kind, (8, 0))[0]
    data = np.random.default_rng(seed).integers(0, 256, (n, ggml_floats.row_bytes(kind, k))).astype(np.uint8)
    with np.errstate(all="ignore"):
        ours = ggml_floats.to_float32(data, kind)
        owner = quants.dequantize(data, GGMLQuantizationType[kind]).reshape(n, k)
    assert ours.dtype == np.float32 and ours.shape == (n, k)
    # A NaN may carry another payload; all else is equal to the bit.
    number = ~np.isnan(owner)
    assert np.array_equal(np.isnan(ours), ~number)
    assert np.array_equal(ours[number].view(np.uint32), np.asarray(owner, np.float32)[number].view(np.uint32))


@pytest.mark.parametrize("kind", ggml_floats.BLOCKS)
def test_rows_that_do_not_divide_are_refused(kind: str) -> None:
    with pytest.raises(FormatError, match="tensor w: rows of 72 values"):
        ggml_floats.row_bytes(kind, 72, "w")
