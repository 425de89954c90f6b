"""trits5 against golden bytes, digits by division, and words2 on boundary shapes."""

import itertools

import numpy as np
import pytest

from bitnet_mlx.errors import FormatError
from bitnet_mlx.formats import trits5, words2

SHAPES = [(1, 1), (3, 4), (1, 5), (2, 19), (5, 20), (1, 21), (33, 100), (3, 128), (7, 129), (64, 2560), (3, 6912)]


def random_ternary(n, k):
    return np.random.default_rng((n, k)).integers(-1, 2, (n, k)).astype(np.int8)


def test_golden_bytes():
    """Frozen: this is how trits5 files lie on disk."""
    t = np.array([[1, 0, -1, 0, 1, -1, -1, -1, -1, -1, 1, 1, 1, 1, 1, -1, 0, 0, -1, 1, 0, 1]], np.int8)
    words = trits5.pack(t)
    assert words.view(np.uint8).tolist() == [[205, 0, 255, 41, 156, 128, 128, 128]]
    assert words.tolist() == [[0x29FF00CD, 0x8080809C]]


def test_every_byte():
    """All 243 values: the byte is the rounded-up fraction, and its weights are the digits by division."""
    t = np.array(list(itertools.product((-1, 0, 1), repeat=5)), np.int8)  # in ascending order of value
    packed = trits5.pack(np.repeat(t, 4, axis=1).reshape(243, 5, 4).swapaxes(1, 2).reshape(243, 20)).view(np.uint8)
    value = np.arange(243)
    assert np.array_equal(packed, np.repeat(-(-value * 256 // 243), 4).reshape(243, 4))
    assert len(set(packed[:, 0].tolist())) == 243
    digits = value[:, None] // 3 ** np.arange(4, -1, -1) % 3
    assert np.array_equal(trits5.unpack(packed.view("<u4"), 5), digits - 1)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_round_trip_and_conversion(n, k):
    t = random_ternary(n, k)
    words = trits5.pack(t)
    assert words.dtype == np.uint32 and words.shape == (n, trits5.width(k)) == (n, -(-k // 20))
    trits5.check(words, k, "w")
    assert np.array_equal(trits5.unpack(words, k), t)
    assert not trits5.unpack(words, 20 * words.shape[1])[:, k:].any()
    assert np.array_equal(trits5.to_words2(words, k), words2.pack(t))
    assert np.array_equal(trits5.from_words2(words2.pack(t), k), words)


def test_blocks_of_rows(monkeypatch):
    monkeypatch.setattr(trits5, "_BLOCK", 100)
    t = random_ternary(11, 43)
    words = trits5.pack(t)
    assert np.array_equal(trits5.unpack(words, 43), t)
    assert np.array_equal(trits5.to_words2(words, 43), words2.pack(t))
    words.view(np.uint8)[9, 3] = 20
    with pytest.raises(FormatError, match="byte 20 in row 9"):
        trits5.check(words, 43, "w")


def test_no_rows():
    empty = np.zeros((0, 43), np.int8)
    assert trits5.pack(empty).shape == (0, 3)
    assert trits5.to_words2(trits5.pack(empty), 43).shape == (0, 8)


def test_refusals():
    with pytest.raises(FormatError, match="from -1 to 2"):
        trits5.pack(np.array([[2, -1]], np.int8))
    words = trits5.pack(random_ternary(2, 41))
    with pytest.raises(FormatError, match=r"need uint32 \[N, 3\]"):
        trits5.check(words[:, :2], 41, "w")
    with pytest.raises(FormatError, match="int64"):
        trits5.check(words.astype(np.int64), 41, "w")
    trits5.check(words, 41, "w")
    with pytest.raises(FormatError, match="past column 41"):
        trits5.check(trits5.pack(np.ones((1, 42), np.int8)), 41, "w")
