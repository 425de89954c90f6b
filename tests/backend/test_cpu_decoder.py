"""The cpu decoder against the numpy decoder: equal to the last bit, for every storage, batch and chunking."""

from __future__ import annotations

import copy
import itertools
import pickle

import numpy as np
import pytest

from bitnet_mlx.errors import BackendError, MemoryLimitError
from bitnet_mlx.formats.dense import DenseRows
from bitnet_mlx.models.config import RopeConfig
from bitnet_mlx.models.decoder_cpu import CpuDecoder
from bitnet_mlx.models.decoder_numpy import NumpyDecoder
from bitnet_mlx.models.weights import DecoderWeights, Linear
from bitnet_mlx.ternary import TernaryTensor
from tests.support.random_model import random_ternary, random_weights, tiny_config

LLAMA = dict(model_type="llama", hidden_act="silu", sub_norms=False, tie_word_embeddings=False)
# Each case: changes to the config, then arguments of random_weights.
CASES: dict[str, tuple[dict, dict]] = {
    "bitnet": ({}, {}),
    "llama": (LLAMA, dict(head="float32")),
    "one group, whole blocks": (
        dict(hidden_size=256, intermediate_size=384, head_dim=64, num_key_value_heads=4, vocab_size=130), dict(head="8")
    ),
    "wide heads, deep K": (
        dict(hidden_size=96, intermediate_size=2700, head_dim=74, num_attention_heads=6, num_key_value_heads=1),
        dict(scale="row", head="6", bias=True),
    ),
    "scales in groups": (dict(LLAMA, hidden_size=200, intermediate_size=328), dict(scale="group", head="4", bias=True)),
    "some linears dense": (dict(LLAMA), dict(dense=("self_attn.k_proj", "mlp.up_proj", "mlp.down_proj"), bias=True)),
    "all linears of an input dense": (
        {}, dict(dense=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"), head="8")
    ),
    "a bfloat16 head in whole groups": (dict(hidden_size=576, vocab_size=83), dict(head="bfloat16")),
    "an 8-bit head in whole groups": (dict(LLAMA, hidden_size=640, vocab_size=83), dict(head="8", bias=True)),
    "heads of two": (dict(head_dim=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=3), dict(seed=5)),
    "yarn": (
        dict(LLAMA, rope=RopeConfig(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)), dict(head="8")
    ),
}  # fmt: skip


def build(case: str) -> DecoderWeights:
    changes, arguments = CASES[case]
    return random_weights(tiny_config(**changes), **arguments)


def tokens(weights: DecoderWeights, count: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(0, weights.config.vocab_size, count).tolist()


def run(decoder, ids: list[int], cuts: tuple[int, ...] = ()) -> np.ndarray:
    """Logits after every token, fed in pieces that end at `cuts`."""
    cache = decoder.make_cache()
    edges = [0, *cuts, len(ids)]
    parts = [decoder.step([ids[a:b]], [cache], "all")[0] for a, b in itertools.pairwise(edges)]
    assert cache.offset == len(ids)
    return np.concatenate(parts)


def same(got: np.ndarray, want: np.ndarray) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype == np.float32
    assert np.isfinite(want).all()
    different = np.argwhere(got != want)
    assert not len(different), (
        f"{len(different)} differ, first at {different[0]}: {got[got != want][0]} {want[got != want][0]}"
    )


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_the_reference(case: str) -> None:
    weights = build(case)
    ids = tokens(weights, 20)
    want = run(NumpyDecoder(weights), ids)
    for serial_below in (0, 1 << 40):  # every job on all threads; every job on one
        decoder = CpuDecoder(weights, serial_below=serial_below)
        same(run(decoder, ids), want)  # panels
        same(run(decoder, ids, (1, 2, 4, 7, 11, 19)), want)  # 1, 2, 3, 4 and 8 rows at once
        same(run(decoder, ids, (5, 14)), want)  # panels of 5, of 8 and 1


@pytest.mark.parametrize(("name", "storage"), [("float16", np.float16), ("bfloat16", np.uint16)])
def test_dense_linears_in_two_bytes(name: str, storage: type) -> None:
    weights = build("llama")
    rng = np.random.default_rng(2)
    for key, linear in weights.linears.items():
        w = rng.standard_normal(linear.weight.shape).astype(np.float32)
        data = w.astype(np.float16) if storage is np.float16 else (w.view(np.uint32) >> 16).astype(np.uint16)
        weights.linears[key] = Linear(DenseRows(data, name), linear.bias)
    ids = tokens(weights, 11)
    same(run(CpuDecoder(weights), ids), run(NumpyDecoder(weights), ids))


@pytest.mark.parametrize("scale", ["tensor", "row", "group"])
def test_activations_in_floating_point(scale: str) -> None:
    weights = random_weights(tiny_config(hidden_size=136), scale=scale, bias=True)
    for key, linear in weights.linears.items():
        w = linear.weight
        assert isinstance(w, TernaryTensor)
        weights.linears[key] = Linear(TernaryTensor(w.words, w.scale, w.shape, 16), linear.bias)
    weights.lm_head = random_ternary(np.random.default_rng(4), 67, 136, scale)
    ids = tokens(weights, 9)
    same(run(CpuDecoder(weights), ids, (1, 3)), run(NumpyDecoder(weights), ids))


def test_a_batch_of_different_lengths_changes_nothing() -> None:
    weights = build("bitnet")
    reference, decoder = NumpyDecoder(weights), CpuDecoder(weights, serial_below=0)
    sequences = [tokens(weights, n, n) for n in (1, 7, 30, 3)]
    caches = [decoder.make_cache() for _ in sequences]
    first = decoder.step([ids[: len(ids) // 2 or 1] for ids in sequences], caches, "all")
    rest = [(i, ids[len(ids) // 2 :]) for i, ids in enumerate(sequences) if len(ids) > 1]
    second = decoder.step([ids for _, ids in rest], [caches[i] for i, _ in rest])
    for i, ids in enumerate(sequences):
        want = run(reference, ids)
        same(first[i], want[: len(first[i])])
        for y, (j, _) in zip(second, rest, strict=True):
            if i == j:
                same(y, want[-1])


def test_rows_past_one_chunk_and_a_cache_that_grows() -> None:
    weights = random_weights(tiny_config(max_position_embeddings=700, num_hidden_layers=1))
    ids = tokens(weights, 600)
    decoder = CpuDecoder(weights, serial_below=0)
    want = run(NumpyDecoder(weights), ids, tuple(range(100, 600, 100)))
    same(run(decoder, ids), want)
    caches = [decoder.make_cache(), decoder.make_cache()]
    last = decoder.step([ids[:300], ids], caches)
    same(last[0], want[299])
    same(last[1], want[599])


def test_weights_at_odd_addresses() -> None:
    weights = build("one group, whole blocks")
    ids = tokens(weights, 9)
    want = run(NumpyDecoder(weights), ids)
    for key, linear in weights.linears.items():
        w = linear.weight
        assert isinstance(w, TernaryTensor)
        room = np.zeros(w.words.nbytes + 1, np.uint8)
        words = room[1:].view(np.uint32).reshape(w.words.shape)
        words[:] = w.words
        words.flags.writeable = False
        weights.linears[key] = Linear(TernaryTensor(words, w.scale, w.shape), linear.bias)
    same(run(CpuDecoder(weights), ids, (1,)), want)


def test_a_trimmed_cache_goes_on_from_there() -> None:
    weights = build("llama")
    decoder, ids = CpuDecoder(weights), tokens(weights, 12)
    cache = decoder.make_cache()
    decoder.step([ids], [cache])
    cache.trim(5)
    same(decoder.step([ids[5:]], [cache])[0], run(NumpyDecoder(weights), ids)[-1])


def test_bad_requests_are_refused_and_change_nothing() -> None:
    weights = build("bitnet")
    decoder = CpuDecoder(weights)
    cache = decoder.make_cache(limit=4)
    decoder.step([[1, 2]], [cache])
    for ids, problem in (([67], "token 67"), ([3, -1], "token -1"), ([], "no tokens")):
        with pytest.raises(BackendError, match=problem):
            decoder.step([ids], [cache])
    with pytest.raises(BackendError, match="a cache of its own"):
        decoder.step([[1], [2]], [cache, cache])
    with pytest.raises(MemoryLimitError):
        decoder.step([[1, 2, 3]], [cache])
    assert cache.offset == 2
    same(decoder.step([[5]], [cache])[0], run(NumpyDecoder(weights), [1, 2, 5])[-1])


def test_a_copied_cache_is_one_of_its_own() -> None:
    """The addresses that a cache keeps are not the copy's; both go on, and grow, apart."""
    weights = build("bitnet")
    decoder, ids = CpuDecoder(weights), tokens(weights, 100)
    want = run(decoder, ids)
    cache = decoder.make_cache()
    decoder.step([ids[:30]], [cache])
    for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        same(decoder.step([[5] * 60], [twin])[0], run(decoder, [*ids[:30], *[5] * 60])[-1])
    twin = copy.deepcopy(cache)  # turn by turn, in the room that there is
    decoder.step([[5] * 10], [twin])
    decoder.step([ids[30:35]], [cache])
    same(decoder.step([[5] * 5], [twin])[0], run(decoder, [*ids[:30], *[5] * 15])[-1])
    cache.trim(30)
    same(decoder.step([ids[30:]], [cache], "all")[0], want[30:])
    cache.trim(1000)
    assert cache.offset == 100
