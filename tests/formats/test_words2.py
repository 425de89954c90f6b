"""words2 against golden words, shift arithmetic and MLX's own reading of them."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from bitnet_mlx.errors import FormatError
from bitnet_mlx.formats import words2
from bitnet_mlx.ternary import ZERO_WORD


def pattern(count: int) -> np.ndarray:
    """t[i] = ((7 i + i div 5) mod 3) - 1, the test pattern of the format notes."""
    i = np.arange(count)
    return ((7 * i + i // 5) % 3 - 1).astype(np.int8)


def test_golden_words() -> None:
    words = words2.pack(pattern(256)[None])
    assert [hex(w) for w in words[0, :2]] == ["0x12449124", "0x44912449"]
    assert hashlib.sha256(words.tobytes()).hexdigest()[:16] == "4b23324f0eb3208a"


@pytest.mark.parametrize("n", [1, 3, 33])
@pytest.mark.parametrize("k", [1, 8, 10, 16, 100, 127, 128, 129, 2560])
def test_each_code_is_where_the_format_says(n: int, k: int) -> None:
    t = np.random.default_rng(k).integers(-1, 2, (n, k)).astype(np.int8)
    words = words2.pack(t)
    for column in {0, k // 2, k - 1}:
        code = words[:, column // 16] >> np.uint32(2 * (column % 16)) & np.uint32(3)
        assert np.array_equal(code.astype(np.int64) - 1, t[:, column])
    assert np.array_equal(words2.unpack(words, k), t)
    padding = words2.unpack(words, words.shape[1] * 16)[:, k:]
    assert not padding.any()
    words2.check(words, k, "w")


def test_mlx_reads_the_same_weights() -> None:
    import mlx.core as mx

    t = np.random.default_rng(0).integers(-1, 2, (5, 256)).astype(np.int8)
    ones = mx.ones((5, 2))
    seen = mx.dequantize(mx.array(words2.pack(t)), ones, -ones, group_size=128, bits=2)
    assert np.array_equal(np.array(seen), t)


@pytest.mark.parametrize("value", [-2, 2, 127])
def test_pack_refuses_other_values(value: int) -> None:
    with pytest.raises(FormatError, match="-1, 0 and 1"):
        words2.pack(np.array([[0, value]], np.int8))


def test_code_3_is_refused_with_tensor_and_row() -> None:
    words = words2.pack(np.zeros((20_000, 128), np.int8))  # more than one block of rows
    words[12_345, 5] |= np.uint32(3 << 8)
    with pytest.raises(FormatError, match=r"tensor w holds code 3 in row 12345"):
        words2.check(words, 128, "w")


@pytest.mark.parametrize("k", [10, 16, 100, 127])
def test_padding_that_is_not_zero_is_refused(k: int) -> None:
    words = words2.pack(np.zeros((2, k), np.int8))
    bad = words.copy()
    bad[1, k // 16] ^= np.uint32(1 << 2 * (k % 16))  # code 1 becomes code 0: the weight -1
    with pytest.raises(FormatError, match="padding past column"):
        words2.check(bad, k, "w")
    assert words[0, -1] == ZERO_WORD or k == 127
