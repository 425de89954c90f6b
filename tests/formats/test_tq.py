"""TQ1_0 and TQ2_0: golden bytes, and equality to the bit with the package that owns the formats."""

from __future__ import annotations

import hashlib
import tracemalloc

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_mlx.errors import FormatError
from bitnet_mlx.formats import tq, words2

KINDS = ("TQ1_0", "TQ2_0")
PATTERN = ((7 * np.arange(256) + np.arange(256) // 5) % 3 - 1).astype(np.int8)[None]
GOLDEN = {
    "TQ2_0": ([88, 129, 22, 96, 5, 88, 129, 22, 96, 5, 88, 129, 22, 96, 5, 88], "a75418f702ccb19d"),
    "TQ1_0": ([70, 93, 209, 24, 116], "d6fc540abf101e10"),
}
TERNARY = {
    "random": lambda rng, shape: rng.integers(-1, 2, shape),
    "zeros": lambda rng, shape: np.zeros(shape),
    "ones": lambda rng, shape: np.ones(shape),
    "minus ones": lambda rng, shape: -np.ones(shape),
    "sparse": lambda rng, shape: rng.integers(-1, 2, shape) * (rng.random(shape) < 0.002),
}


def owner_encodes(t: np.ndarray, scale: float, kind: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return quants.quantize(t.astype(np.float32) * np.float32(scale), GGMLQuantizationType[kind])


def owner_decodes(data: np.ndarray, kind: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return quants.dequantize(data, GGMLQuantizationType[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_golden_bytes_both_ways(kind: str) -> None:
    first, digest = GOLDEN[kind]
    words = words2.pack(PATTERN)
    data = tq.from_words2(words, np.float32(0.5), 256, kind)
    assert data[0, : len(first)].tolist() == first and data[0, -2:].tolist() == [0, 56]
    assert hashlib.sha256(data.tobytes()).hexdigest()[:16] == digest
    decoded, d = tq.to_words2(data, 256, kind)
    assert np.array_equal(decoded, words) and d.tolist() == [[0.5]]


def test_a_block_of_zeros() -> None:
    words = words2.pack(np.zeros((1, 256), np.int8))
    assert tq.from_words2(words, np.float32(3), 256, "TQ2_0").tolist() == [[85] * 64 + [0, 0]]
    assert tq.from_words2(words, np.float32(3), 256, "TQ1_0").tolist() == [[128] * 48 + [127] * 4 + [0, 0]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("values", TERNARY)
@pytest.mark.parametrize("shape", [(1, 256), (3, 512), (7, 2560), (5, 6912)])
def test_encoding_and_decoding_equal_the_owners(kind: str, values: str, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(shape)
    t = TERNARY[values](rng, shape).astype(np.int8)
    data = tq.from_words2(words2.pack(t), np.float32(1.2345678), shape[1], kind)
    assert np.array_equal(data, owner_encodes(t, 1.2345678, kind))
    words, d = tq.to_words2(data, shape[1], kind)
    assert np.array_equal(words2.unpack(words, shape[1]), t)
    ours = words2.unpack(words, shape[1]) * np.repeat(d, 256, axis=1)
    assert np.array_equal(ours, owner_decodes(data, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_scales_that_differ_by_row_and_by_group(kind: str) -> None:
    rng = np.random.default_rng(5)
    t = rng.integers(-1, 2, (4, 768)).astype(np.int8)
    scale = rng.uniform(0.01, 9, (4, 3)).astype(np.float16).astype(np.float32)
    data = tq.from_words2(words2.pack(t), np.repeat(scale, 2, axis=1), 768, kind)
    assert np.array_equal(tq.to_words2(data, 768, kind)[1], scale)
    by_row = tq.from_words2(words2.pack(t), scale[:, 0], 768, kind)
    assert np.array_equal(tq.to_words2(by_row, 768, kind)[1], np.repeat(scale[:, :1], 3, axis=1))


# Any byte is a TQ1_0 byte, the 13 that no encoder writes too; the fifth digit of the last four bytes is not read.
@settings(deadline=None, max_examples=60, database=None)
@given(st.binary(min_size=54, max_size=54), st.integers(1, 4))
def test_any_bytes_of_tq1_0_decode_as_the_owner_decodes_them(raw: bytes, rows: int) -> None:
    data = np.tile(np.frombuffer(raw, np.uint8), (rows, 1))
    words, d = tq.to_words2(data, 256, "TQ1_0")
    with np.errstate(all="ignore"):
        ours = np.repeat(d, 256, axis=1) * words2.unpack(words, 256)
    assert np.array_equal(ours, owner_decodes(data, "TQ1_0"), equal_nan=True)


def test_every_byte_of_tq1_0() -> None:
    data = np.zeros((256, 54), np.uint8)
    data[:, :52] = np.arange(256)[:, None]
    data[:, 53] = 0x3C  # d = 1
    words, _ = tq.to_words2(data, 256, "TQ1_0")
    assert np.array_equal(words2.unpack(words, 256), owner_decodes(data, "TQ1_0"))


@settings(deadline=None, max_examples=60, database=None)
@given(st.binary(min_size=66, max_size=66))
def test_any_bytes_of_tq2_0_decode_as_the_owner_decodes_them_or_hold_code_3(raw: bytes) -> None:
    data = np.frombuffer(raw, np.uint8)[None]
    for chosen in (data, np.concatenate([data[:, :64] & 0xAA, data[:, 64:]], axis=1)):
        if any(byte >> shift & 3 == 3 for byte in chosen[0, :64].tolist() for shift in (0, 2, 4, 6)):
            with pytest.raises(FormatError, match="tensor w holds code 3 in row 0, block 0;"):
                tq.to_words2(chosen, 256, "TQ2_0", "w")
            continue
        words, d = tq.to_words2(chosen, 256, "TQ2_0")
        with np.errstate(all="ignore"):
            ours = np.repeat(d, 256, axis=1) * words2.unpack(words, 256)
        assert np.array_equal(ours, owner_decodes(chosen, "TQ2_0"), equal_nan=True)


@settings(deadline=None, max_examples=40, database=None)
@given(st.integers(1, 9), st.integers(1, 4), st.sampled_from(KINDS), st.integers(0, 2**32 - 1))
def test_round_trip(n: int, blocks: int, kind: str, seed: int) -> None:
    t = np.random.default_rng(seed).integers(-1, 2, (n, 256 * blocks)).astype(np.int8)
    words = words2.pack(t)
    assert np.array_equal(
        tq.to_words2(tq.from_words2(words, np.float32(2), t.shape[1], kind), t.shape[1], kind)[0], words
    )


def test_code_3_far_inside_is_found_with_its_place() -> None:
    data = tq.from_words2(words2.pack(np.zeros((2000, 1024), np.int8)), np.float32(1), 1024, "TQ2_0")
    data[1777, 3 * 66 + 5] = 0xD5
    with pytest.raises(FormatError, match="tensor w holds code 3 in row 1777, block 3;"):
        tq.to_words2(data, 1024, "TQ2_0", "w")


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_block_cannot_hold_is_refused(kind: str) -> None:
    words = words2.pack(np.ones((2, 256), np.int8))
    with pytest.raises(FormatError, match="needs a multiple of 256"):
        tq.from_words2(words2.pack(np.ones((2, 128), np.int8)), np.float32(1), 128, kind)
    for scale in (1e-9, 1e6):
        with pytest.raises(FormatError, match="float16"):
            tq.from_words2(words, np.float32(scale), 256, kind)
    with pytest.raises(FormatError, match="differ inside a block"):
        tq.from_words2(words, np.array([[1, 1], [1, 2]], np.float32), 256, kind)
    with pytest.raises(FormatError, match=r"tensor w is uint8 \(2, 60\)"):
        tq.to_words2(np.zeros((2, 60), np.uint8), 256, kind, "w")


@pytest.mark.parametrize("kind", KINDS)
def test_conversion_takes_constant_memory_beside_the_result(kind: str) -> None:
    data = tq.from_words2(words2.pack(np.zeros((4096, 4096), np.int8)), np.float32(1), 4096, kind)
    tracemalloc.start()
    try:
        words, d = tq.to_words2(data, 4096, kind)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < words.nbytes + d.nbytes + 8e6
