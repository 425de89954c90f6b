"""A token as one compiled function: its cache, its traces, and the numbers of the way layer by layer."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from bitnet_mlx import _mlxlm
from bitnet_mlx.backends.attention_mlx import RECENT
from bitnet_mlx.backends.mlx_affine import StockOps
from bitnet_mlx.errors import MemoryLimitError
from bitnet_mlx.models import compiled_mlx
from bitnet_mlx.models.cache_mlx import KVCache, capacity
from bitnet_mlx.models.decoder_mlx import MlxModel
from tests.mlx_engine.test_mlx_decoder import build, ids
from tests.mlx_engine.test_mlx_fused import Adapter, logits

CASES = ["bitnet", "llama, group scales, biases, 6-bit head"]


class Whole(StockOps):
    """Stock operations for which a token is compiled whole, as our kernels are on a GPU."""

    compiles = True

    def __init__(self) -> None:
        self.attentions = 0  # called from Python

    def attends(self, *_: Any) -> bool:
        return True

    def decode_attention(self, *args: Any) -> tuple[mx.array, mx.array]:
        self.attentions += 1
        return super().decode_attention(*args)


@pytest.fixture
def untraced() -> Iterator[None]:
    mx.disable_compile()
    yield
    mx.enable_compile()


def close(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal but for the order in which attention sums."""
    return bool(np.abs(a - b).max() < 2e-5 * np.abs(b).max())


@pytest.mark.parametrize("case", CASES)
def test_a_whole_token_gives_the_plain_numbers(case: str, untraced: None) -> None:
    """Prompts from one token up; more single tokens than `recent` holds."""
    weights, ops = build(case, num_hidden_layers=3), Whole()
    model, plain = MlxModel(weights, ops=ops), MlxModel(weights)
    for prompt, steps in ((1, 3), (5, RECENT + 3)):
        before = ops.attentions
        assert close(logits(model, prompt, steps), logits(plain, prompt, steps))
        assert ops.attentions - before == 3 * (steps + (prompt == 1))


def test_sequences_of_one_length_go_together(untraced: None) -> None:
    weights, ops = build("bitnet"), Whole()
    model = MlxModel(weights, ops=ops)
    prompts, cache = mx.array([ids(1, 6), ids(2, 6), ids(3, 6)]), model.make_cache()
    model(prompts, cache)
    together = [np.array(model(mx.array([[5], [6], [7]]), cache)) for _ in range(3)]
    assert ops.attentions == 3 * len(model.layers)
    for row, token in enumerate((5, 6, 7)):
        single = model.make_cache()
        model(prompts[row : row + 1], single)
        for expected in together:
            assert close(np.array(model(mx.array([[token]]), single))[0], expected[row])


def test_the_cache_is_the_same_whoever_asks(untraced: None) -> None:
    """Trimming inside and below the recent positions, the state, a copy, a prompt behind single tokens, growth."""
    weights = build("bitnet", num_hidden_layers=2, max_position_embeddings=1024)
    model, plain = MlxModel(weights, ops=Whole()), MlxModel(weights)
    caches = model.make_cache(), plain.make_cache()

    def agree(tokens: list[int]) -> None:
        found, expected = (m.step([tokens], [c])[0] for m, c in zip((model, plain), caches, strict=True))
        assert close(found, expected) and caches[0].offset == caches[1].offset

    agree(ids(1, 250))
    for i in range(10):
        agree([i])  # past 256, where the array grows
    assert caches[0][0].lengths == (250, 10)
    for cut in (257, 245):
        for cache in caches:
            cache.trim(cut)
        agree([3])
    other = copy.deepcopy(caches[0])
    agree([4])
    assert other.offset == caches[0].offset - 1 and other[0].lengths != caches[0][0].lengths
    agree(ids(5, 7))
    agree([6])
    for a, b in zip(caches[0], caches[1], strict=True):
        assert a.size() == b.size() and a.nbytes == sum(x.nbytes for x in a.arrays)
        keys, values, offset = a.state
        assert a.lengths == (offset, 0)
        assert close(np.array(keys[:, :, :offset]), np.array(b.keys[:, :, :offset]))
        assert close(np.array(values[:, :, :offset]), np.array(b.values[:, :, :offset]))
    caches[0][:] = [KVCache.from_state(c.state) for c in caches[0]]
    agree([7])


def test_the_limit_is_kept(untraced: None) -> None:
    model = MlxModel(build("bitnet"), ops=Whole())
    cache = model.make_cache(limit=5)
    model.step([[1, 2, 3]], [cache])
    model.step([[4]], [cache])
    model.step([[5]], [cache])
    with pytest.raises(MemoryLimitError, match="6 positions are needed and 5 are allowed"):
        model(mx.array([[6]]), cache)
    assert cache.offset == 5 and cache[0].keys.shape[2] == 5


def test_other_caches_and_other_layers_go_layer_by_layer(untraced: None) -> None:
    ops = Whole()
    weights = build("bitnet")
    model, plain = MlxModel(weights, ops=ops), MlxModel(weights)
    theirs = _mlxlm.module("models.cache")
    assert close(*(np.array(m(mx.array([[1]]), [theirs.KVCache() for _ in m.layers])) for m in (model, plain)))
    assert close(*(np.array(m(mx.array([[1]]))) for m in (model, plain)))  # and without a cache
    uneven = model.make_cache()
    model(mx.array([[1, 2, 3]]), uneven)
    uneven[0].trim(1)
    model(mx.array([[1]]), uneven)
    for m in (model, plain):
        m.layers[1].self_attn.v_proj = Adapter(m.layers[1].self_attn.v_proj)
    assert close(logits(model), logits(plain))
    assert ops.attentions == 0


def test_arrays_grow_by_a_third_or_a_half() -> None:
    sizes = list(dict.fromkeys(capacity(n) for n in range(5000)))
    assert sizes == [256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144]
    assert all(capacity(n) >= n for n in range(5000))


def test_the_latest_are_kept() -> None:
    made: list[int] = []
    latest = compiled_mlx.Latest(2, lambda: made.append(1) or len(made))
    assert [latest.get(key) for key in "abacb"] == [1, 2, 1, 3, 4]  # c drops b, which a was used after


if shutil.which("c++") or shutil.which("g++"):  # what MLX's CPU device compiles a graph with

    @pytest.mark.parametrize("case", CASES)
    def test_a_trace_serves_until_something_changes(case: str) -> None:
        weights, ops = build(case, num_hidden_layers=2), Whole()
        model, plain = MlxModel(weights, ops=ops), MlxModel(weights)
        expected = logits(plain, 3, 4)
        assert close(logits(model, 3, 4), expected)
        assert ops.attentions == 2  # traced once, for two layers
        assert close(logits(model, 3, 4), expected) and ops.attentions == 2
        down = model.layers[0].mlp.down_proj
        scale, down.scale = down.scale, down.scale * 2
        assert not close(logits(model, 3, 4), expected) and ops.attentions == 2  # layer by layer
        down.scale = scale
        assert close(logits(model, 3, 4), expected) and ops.attentions == 4
