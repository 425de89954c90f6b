"""Hugging Face's packed bytes: golden bytes, and the rule of the layout told row by row."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from bitnet_mlx.errors import FormatError
from bitnet_mlx.formats import hf, words2
from tests.support.hf_folder import pack

GOLDEN_ROWS = [[0, -1, 1], [-1, 1, 0], [-1, 1, -1], [-1, 1, 1], [1, 0, 0], [0, -1, -1], [1, -1, 1], [1, -1, 0]]
GOLDEN_BYTES = [[161, 24, 146], [144, 10, 73]]
# Four neighbouring rows in a byte, the layout that this one is taken for.
NAIVE_BYTES = [[1, 168, 134], [166, 1, 97]]


def test_golden_bytes_both_ways() -> None:
    words = words2.pack(np.array(GOLDEN_ROWS, np.int8))
    assert hf.from_words2(words, 3).tolist() == GOLDEN_BYTES
    assert np.array_equal(hf.to_words2(np.array(GOLDEN_BYTES, np.uint8), 8), words)
    assert not np.array_equal(hf.to_words2(np.array(NAIVE_BYTES, np.uint8), 8), words)


# One block, several blocks (a block is 2^18 bytes of rows padded to 128 codes), and every remainder of N and K.
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 8, 33, 129, 516])
@pytest.mark.parametrize("k", [1, 3, 8, 10, 100, 128, 129, 2560])
def test_every_row_lands_where_the_format_says(n: int, k: int) -> None:
    t = np.random.default_rng((n, k)).integers(-1, 2, (n, k)).astype(np.int8)
    packed = pack(t)
    words = hf.to_words2(packed, n)
    assert np.array_equal(words, words2.pack(t))
    assert np.array_equal(hf.from_words2(words, k), packed)


def test_rows_past_n_are_cropped() -> None:
    """Five rows lie in two byte rows; the fields of rows 5 to 7 hold 0, which would read as -1."""
    t = np.ones((5, 4), np.int8)
    packed = pack(t)
    assert packed.tolist() == [[0b101010] * 4, [0b1010] * 4]
    assert np.array_equal(words2.unpack(hf.to_words2(packed, 5), 4), t)


@pytest.mark.parametrize(("row", "column", "field"), [(0, 0, 0), (1, 2, 3), (1, 99, 1)])
def test_code_3_is_refused_with_its_place(row: int, column: int, field: int) -> None:
    packed = pack(np.zeros((8, 100), np.int8))
    packed[row, column] |= np.uint8(3 << 2 * field)
    with pytest.raises(FormatError, match=rf"tensor w holds code 3 in byte row {row}, column {column};"):
        hf.to_words2(packed, 8, "w")


def test_code_3_far_inside_a_large_tensor_is_found() -> None:
    packed = pack(np.zeros((1200, 2560), np.int8))
    packed[271, 1234] = 0xFF
    with pytest.raises(FormatError, match="byte row 271, column 1234"):
        hf.to_words2(packed, 1200)


@pytest.mark.parametrize(
    "packed", [np.zeros((2, 4), np.int8), np.zeros((3, 4), np.uint8), np.zeros(8, np.uint8), np.zeros((8, 4), np.uint8)]
)
def test_another_dtype_or_shape_is_refused(packed: np.ndarray) -> None:
    with pytest.raises(FormatError, match=r"a packed weight of 8 rows is uint8 \[2, K\]"):
        hf.to_words2(packed, 8)


def test_conversion_and_check_take_little_memory_beside_the_result() -> None:
    packed = pack(np.zeros((4096, 4096), np.int8))
    tracemalloc.start()
    try:
        words = hf.to_words2(packed, 4096)
        converted = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        words2.check(words, 4096, "w")
        checked = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert converted < words.nbytes + 4e6
    assert checked < 2e6 < words.nbytes
