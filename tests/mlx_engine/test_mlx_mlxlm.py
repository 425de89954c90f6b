"""mlx-lm's own loops run our model object, and its caches and ours stand in for each other."""

from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from bitnet_mlx import _mlxlm
from bitnet_mlx.errors import BackendError
from bitnet_mlx.models.cache_mlx import KVCache
from bitnet_mlx.models.decoder_mlx import MlxModel
from bitnet_mlx.ternary import TernaryTensor
from tests.support.random_model import random_weights, tiny_config
from tests.support.versions import installed

PROMPT = [5, 9, 2, 60, 33, 7, 7, 12]


@pytest.fixture(scope="module")
def model() -> MlxModel:
    # Heads of 64 columns, which mlx-lm's quantised cache needs.
    config = tiny_config(head_dim=64, num_attention_heads=2, num_key_value_heads=1)
    weights = random_weights(config, head="8", scale="row")
    for name, linear in weights.linears.items():
        w = linear.weight
        assert isinstance(w, TernaryTensor)
        if name.endswith("q_proj"):  # soft attention, as in trained models
            weights.linears[name] = replace(linear, weight=replace(w, scale=w.scale * np.float32(0.01)))
    return MlxModel(weights)


def greedy(model: MlxModel, prompt: list[int], count: int) -> list[int]:
    """The plain loop over the Decoder protocol."""
    cache, tokens, out = model.make_cache(), prompt, []
    for _ in range(count):
        out.append(int(model.step([tokens], [cache])[0].argmax()))
        tokens = out[-1:]
    return out


def mlxlm_tokens(model: MlxModel, count: int, **options: Any) -> list[int]:
    steps = _mlxlm.module("generate").generate_step(mx.array(PROMPT), model, max_tokens=count, **options)
    return [int(token) for token, _ in steps]


def test_the_file_limit_survives_the_import() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    _mlxlm.module("utils")
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before
    assert resource.setrlimit.__module__ == "resource"
    with pytest.raises(BackendError, match="mlx_lm.no_such_part does not import here"):
        _mlxlm.module("no_such_part")


def test_generate_step_gives_our_greedy_tokens(model: MlxModel) -> None:
    expected = greedy(model, PROMPT, 30)
    assert mlxlm_tokens(model, 30) == expected
    assert mlxlm_tokens(model, 30, prefill_step_size=3) == expected
    cache = model.make_cache()
    assert mlxlm_tokens(model, 30, prompt_cache=cache) == expected
    assert cache.offset == len(PROMPT) + 30 and isinstance(cache[0], KVCache)


def test_stream_generate_runs_the_model(model: MlxModel) -> None:
    """With a word tokenizer of transformers' own kind, made here: token i is the word "w<i>"."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {f"w{i}": i for i in range(67)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w66", unk_token="w0")
    stream = _mlxlm.module("generate").stream_generate(model, fast, PROMPT, max_tokens=12)
    responses = list(stream)
    expected = greedy(model, PROMPT, 12)
    assert [r.token for r in responses] == expected and 66 not in expected
    assert responses[-1].finish_reason == "length" and responses[0].prompt_tokens == len(PROMPT)
    assert "".join(r.text for r in responses).split() == [f"w{t}" for t in expected]


def test_mlxlm_caches_serve_our_decoder(model: MlxModel) -> None:
    caches = _mlxlm.module("models.cache")
    expected = np.array(model(mx.array([PROMPT]), model.make_cache()))
    for make in (caches.KVCache, lambda: caches.RotatingKVCache(max_size=64, keep=4)):
        cache = [make() for _ in model.layers]
        head = np.array(model(mx.array([PROMPT[:5]]), cache))
        tail = np.array(model(mx.array([PROMPT[5:]]), cache))
        assert np.abs(np.concatenate([head, tail], axis=1) - expected).max() < 1e-4


def test_quantised_cache_runs_and_stays_near(model: MlxModel) -> None:
    cache = model.make_cache()
    model(mx.array([PROMPT[:5]]), cache)
    expected = model(mx.array([PROMPT[5:]]), model_copy := [KVCache.from_state(c.state) for c in cache])
    quantised = [c.to_quantized(group_size=64, bits=8) for c in cache]
    actual = model(mx.array([PROMPT[5:]]), quantised)
    assert [c.offset for c in quantised] == [c.offset for c in model_copy] == [8, 8]
    assert np.corrcoef(np.array(actual).ravel(), np.array(expected).ravel())[0, 1] > 0.99
    assert len(mlxlm_tokens(model, 5, kv_bits=8, quantized_kv_start=0)) == 5


def test_the_batch_generator_takes_our_model(model: MlxModel) -> None:
    """mlx-lm's continuous batching merges our caches into its own: prompts of different lengths, left padded."""
    generate = _mlxlm.module("generate")
    prompts = [PROMPT, PROMPT[:3], [1, 2, 3, 4, 5]]
    generator = generate.BatchGenerator(model, max_tokens=10, stop_tokens=[])
    uids = generator.insert(prompts)
    tokens: dict[int, list[int]] = {uid: [] for uid in uids}
    while responses := generator.next_generated():
        for r in responses:
            tokens[r.uid].append(r.token)
    for uid, prompt in zip(uids, prompts, strict=True):
        assert tokens[uid] == greedy(model, prompt, 10)


if installed("mlx-lm") > (0, 31):  # 0.31, the last for Python 3.10, saves another state

    def test_a_saved_prompt_cache_loads_as_mlxlms_own(model: MlxModel, tmp_path: Path) -> None:
        caches = _mlxlm.module("models.cache")
        cache = model.make_cache()
        model(mx.array([PROMPT[:5]]), cache)
        caches.save_prompt_cache(str(tmp_path / "prompt.safetensors"), cache)
        loaded = caches.load_prompt_cache(str(tmp_path / "prompt.safetensors"))
        assert type(loaded[0]) is caches.KVCache and loaded[0].offset == 5
        expected = np.array(model(mx.array([PROMPT[5:]]), cache))
        assert np.array_equal(np.array(model(mx.array([PROMPT[5:]]), loaded)), expected)
        assert caches.can_trim_prompt_cache(cache) and caches.trim_prompt_cache(cache, 3) == 3 and cache.offset == 5


def test_masks_and_states_are_those_of_mlxlms_cache(model: MlxModel) -> None:
    theirs, ours = _mlxlm.module("models.cache").KVCache(), KVCache()
    assert ours.empty() and theirs.empty() and ours.nbytes == theirs.nbytes == ours.size() == 0
    rng = np.random.default_rng(0)
    for length in (3, 1, 255, 40):
        for window, as_array in ((None, False), (None, True), (2, False), (2, True)):
            a = ours.make_mask(length, return_array=as_array, window_size=window)
            b = theirs.make_mask(length, return_array=as_array, window_size=window)
            if isinstance(a, mx.array):
                assert np.array_equal(np.array(a), np.array(b))
            else:
                assert a == b
        k = mx.array(rng.standard_normal((2, 1, length, 8)).astype(np.float32))
        for x, y in zip(ours.update_and_fetch(k, k + 1), theirs.update_and_fetch(k, k + 1), strict=True):
            assert np.array_equal(np.array(x), np.array(y))
        assert ours.size() == theirs.size() and ours.is_trimmable()
    assert ours.trim(1000) == theirs.trim(1000) == 299
