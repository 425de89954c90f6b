"""KV caches of 16, 8 and 4 bits on MLX: what they hold, what they give back, and what a whole model makes of them."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from bitnet_mlx.api import make_decoder
from bitnet_mlx.errors import ConfigError, MemoryLimitError
from bitnet_mlx.formats.dense import bfloat16_to_float32, float32_to_bfloat16
from bitnet_mlx.models.cache_small_mlx import SmallKVCache
from bitnet_mlx.models.demand import kv_row_bytes
from tests.support.random_model import random_weights, tiny_config

B, HEADS, DIM = 2, 3, 64


def rows(length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal((B, HEADS, length, DIM)).astype(np.float32) * 3 for _ in range(2))  # type: ignore[return-value]


def rounded(x: np.ndarray, bits: int) -> np.ndarray:
    """What is expected back: bfloat16, or the nearest of 2^bits levels between the least and the largest of 64 values."""
    if bits == 16:
        return bfloat16_to_float32(float32_to_bfloat16(x))
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    step = (high - low) / (2**bits - 1)
    return low + np.rint((x - low) / step) * step


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_what_is_put_in_comes_back_rounded(bits: int) -> None:
    cache = SmallKVCache(bits, DIM, limit=600)
    put: list[tuple[np.ndarray, np.ndarray]] = []
    for i, length in enumerate((1, 200, 1, 100, 250)):  # past the first 256 and 512 positions
        put.append(rows(length, i))
        keys, values = cache.update_and_fetch(*map(mx.array, put[-1]))
    for found, expected in zip((keys, values), map(np.concatenate, zip(*put, strict=True), [2, 2]), strict=True):
        step = np.ptp(expected, axis=-1, keepdims=True) / (2**bits - 1) if bits < 16 else np.float32(0)
        # MLX puts the grid so that 0 is one of its points, so that a value may be off by a step.
        assert np.all(np.abs(np.array(found) - rounded(expected, bits)) <= step * 1.01 + 1e-6)
        assert found.dtype == mx.float32
    assert cache.offset == 552
    room = 600
    assert cache.nbytes == 2 * B * HEADS * room * kv_row_bytes(DIM, bits)


def test_trim_shrink_and_limit() -> None:
    cache = SmallKVCache(8, DIM, limit=300)
    cache.update_and_fetch(*map(mx.array, rows(290, 0)))
    assert cache.trim(280) == 280
    freed = cache.shrink()
    assert freed == 290 * 2 * B * HEADS * kv_row_bytes(DIM, 8) * 300 // 290 - cache.nbytes
    assert cache.nbytes == 10 * 2 * B * HEADS * kv_row_bytes(DIM, 8)
    keys, _ = cache.update_and_fetch(*map(mx.array, rows(1, 1)))
    assert keys.shape == (B, HEADS, 11, DIM)
    with pytest.raises(MemoryLimitError, match="301 positions"):
        cache.update_and_fetch(*map(mx.array, rows(290, 2)))
    cache.trim(99)
    cache.shrink()
    assert (cache.offset, cache.nbytes) == (0, 0)


def test_heads_that_no_group_divides() -> None:
    with pytest.raises(ConfigError, match="18 values"):
        SmallKVCache(8, 18)
    with pytest.raises(ConfigError, match="18 values"):
        make_decoder("mlx", random_weights(tiny_config()), kv_bits=4)


def test_a_model_comes_nearer_with_more_bits() -> None:
    weights = random_weights(replace(tiny_config(), head_dim=32))
    ids = [i % 67 for i in range(40)]
    logits = {}
    for bits in (None, 16, 8, 4):
        model = make_decoder("mlx", weights, kv_bits=bits)
        cache = model.make_cache(64)
        first = model.step([ids], [cache], logits="all")[0]
        second = model.step([[5]], [cache])[0]
        logits[bits] = np.concatenate([first, second[None]])
        assert cache.offset == 41
    spread = logits[None].std()
    apart = {bits: float(np.median(np.abs(logits[bits] - logits[None]))) / spread for bits in (16, 8, 4)}
    assert 0 < apart[8] < apart[4]
    assert apart[16] < 0.2
    assert apart[4] < 1.5


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
def test_engines_that_keep_float32_refuse(backend: str) -> None:
    with pytest.raises(ConfigError, match=f"backend is {backend}"):
        make_decoder(backend, random_weights(tiny_config()), kv_bits=8)
