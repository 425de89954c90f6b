"""I2_S in its three layouts: golden bytes, and each rule of the layouts told weight by weight."""

from __future__ import annotations

import hashlib
import tracemalloc
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_mlx.errors import ConfigError, FormatError
from bitnet_mlx.formats import i2s, tq, words2

PATTERN = ((7 * np.arange(256) + np.arange(256) // 5) % 3 - 1).astype(np.int8).reshape(2, 128)


def by_the_rule(t: np.ndarray, layout: str) -> np.ndarray:
    """The bytes of the codes, one weight at a time, as the three quantisers loop."""
    n, k = t.shape
    out = np.zeros(n * k // 4, np.uint8)
    for i, code in enumerate((t + 1).astype(np.uint8).reshape(-1).tolist()):
        if layout == "rows":
            row, column = divmod(i, k)
            out[row // 4 * k + column] |= code << (6 - 2 * (row % 4))
        else:
            block = int(layout)
            b, j = divmod(i, block)
            out[b * block // 4 + j % (block // 4)] |= code << (6 - 2 * (j // (block // 4)))
    return out


def test_golden_bytes() -> None:
    data = i2s.from_words2(words2.pack(PATTERN), 0.5, 128)
    assert data[:8].tolist() == [37, 66, 148, 9, 80, 37, 66, 148] and data[64:68].tolist() == [0, 0, 0, 63]
    assert hashlib.sha256(data.tobytes()).hexdigest()[:16] == "db67ac9f01a0afc0"
    words, scale = i2s.to_words2(data, 2, 128, "128")
    assert np.array_equal(words2.unpack(words, 128), PATTERN) and scale == 0.5


def test_a_byte_is_tq2_0s_with_its_fields_reversed() -> None:
    row = words2.pack(PATTERN.reshape(1, 256))
    ours = i2s.from_words2(row, 1, 256)[:64]
    other = tq.from_words2(row, np.float32(1), 256, "TQ2_0")[0, :64]
    reversed_ = (other >> 6) | (other >> 2 & 0x0C) | (other << 2 & 0x30) | (other << 6 & 0xC0)
    assert np.array_equal(ours, reversed_)


SHAPES = [(8, 32), (4, 96), (8, 96), (12, 128), (4, 160), (16, 2560), (64, 4), (4, 512), (8, 5460)]


@pytest.mark.parametrize("layout", i2s.LAYOUTS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_every_weight_lands_where_the_rule_says(n: int, k: int, layout: str) -> None:
    t = np.random.default_rng((n, k)).integers(-1, 2, (n, k)).astype(np.int8)
    words = words2.pack(t)
    if not i2s.fits(n, k, layout):
        with pytest.raises(FormatError, match="does not divide into chunks"):
            i2s.from_words2(words, 1, k, layout)
        return
    data = i2s.from_words2(words, 0.37, k, layout)
    assert np.array_equal(data[: n * k // 4], by_the_rule(t, layout))
    found, scale = i2s.to_words2(data, n, k, layout)
    assert np.array_equal(found, words) and scale == np.float32(0.37)


@pytest.mark.parametrize("layout", i2s.LAYOUTS)
def test_rows_of_no_whole_bytes_are_refused(layout: str) -> None:
    """64 rows of 30 weights are whole chunks of every layout; a row ends inside a byte of words2."""
    with pytest.raises(FormatError, match="64 rows of 30 weights does not divide.*rows of whole bytes"):
        i2s.from_words2(words2.pack(np.zeros((64, 30), np.int8)), 1, 30, layout)


@settings(deadline=None, max_examples=40, database=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(i2s.LAYOUTS), st.integers(0, 2**32 - 1))
def test_round_trip_where_the_shape_fits(n: int, quarter: int, layout: str, seed: int) -> None:
    k = 4 * quarter
    t = np.random.default_rng(seed).integers(-1, 2, (n, k)).astype(np.int8)
    if i2s.fits(n, k, layout):
        data = i2s.from_words2(words2.pack(t), 3, k, layout)
        assert np.array_equal(i2s.to_words2(data, n, k, layout)[0], words2.pack(t))


def test_a_wrong_layout_gives_other_weights() -> None:
    t = np.random.default_rng(1).integers(-1, 2, (8, 256)).astype(np.int8)
    for written in i2s.LAYOUTS:
        data = i2s.from_words2(words2.pack(t), 1, 256, written)
        for read in i2s.LAYOUTS:
            same = np.array_equal(words2.unpack(i2s.to_words2(data, 8, 256, read)[0], 256), t)
            assert same == (read == written)


def test_the_unused_bytes_may_hold_anything() -> None:
    data = i2s.from_words2(words2.pack(PATTERN), 0.5, 128)
    data[68:] = 0xAB
    assert i2s.to_words2(data, 2, 128, "128")[1] == 0.5


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
def test_a_scale_that_is_none_is_refused(scale: float) -> None:
    data = i2s.from_words2(words2.pack(PATTERN), scale, 128)
    with pytest.raises(FormatError, match="tensor w has the scale"):
        i2s.to_words2(data, 2, 128, "128", "w")


def test_code_3_short_data_and_unknown_layouts_are_refused() -> None:
    data = i2s.from_words2(words2.pack(np.zeros((8192, 1024), np.int8)), 1, 1024)
    data[1_777_777] |= 0xC0
    for read in (partial(i2s.to_words2, layout="128"), i2s.count_zeros):
        with pytest.raises(FormatError, match="tensor w holds code 3 in byte 1777777;"):
            read(data, 8192, 1024, name="w")
    for wrong in (data[:-1], data[:-32]):
        with pytest.raises(FormatError, match=r"are uint8 \[2097184\]"):
            i2s.to_words2(wrong, 8192, 1024, "128")
    with pytest.raises(ConfigError, match="128, 64, rows are allowed"):
        i2s.to_words2(data, 8192, 1024, "32")


@pytest.mark.parametrize("layout", i2s.LAYOUTS)
def test_conversion_takes_constant_memory_beside_the_result(layout: str) -> None:
    data = i2s.from_words2(words2.pack(np.zeros((4096, 4096), np.int8)), 1, 4096, layout)
    tracemalloc.start()
    try:
        words, _ = i2s.to_words2(data, 4096, 4096, layout)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < words.nbytes + 8e6


@pytest.mark.parametrize("layout", i2s.LAYOUTS)
def test_zeros_are_counted_without_a_conversion(layout: str) -> None:
    t = np.random.default_rng(4).integers(-1, 2, (64, 2560)).astype(np.int8)
    data = i2s.from_words2(words2.pack(t), 0.5, 2560, layout)
    assert i2s.count_zeros(data, 64, 2560) == (t == 0).sum()
    for at, byte, text in ((-29, 0xFF, "has the scale"), (99, 0xC0, "holds code 3 in byte 99")):
        broken = data.copy()
        broken[at] = byte
        broken[-30] |= 0x80 if at < 0 else 0
        with pytest.raises(FormatError, match=text):
            i2s.count_zeros(broken, 64, 2560)
