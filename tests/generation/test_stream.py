"""The loop over a real (numpy) decoder with random weights: what is fed, what comes out, when it ends."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bitnet_mlx.errors import ConfigError
from bitnet_mlx.generation import Completion, GenerationResponse, SamplingConfig, generate, stream, stream_generate
from bitnet_mlx.tokenizer import Tokenizer
from tests.support.tiny_chat_model import RecordingDecoder, pair

PROMPT = "hello world def"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[RecordingDecoder, Tokenizer]:
    return pair(tmp_path_factory.mktemp("model"), template=None)


@pytest.fixture
def model(made: tuple[RecordingDecoder, Tokenizer]) -> tuple[RecordingDecoder, Tokenizer]:
    made[0].fed.clear()
    made[0].interrupt_at = None
    return made


def greedy(decoder: RecordingDecoder, ids: list[int], count: int) -> list[int]:
    """The definition: the whole sequence again for every token."""
    out: list[int] = []
    for _ in range(count):
        logits = decoder.step([ids + out], [decoder.make_cache()])[0]
        out.append(int(logits.argmax()))
    decoder.fed.clear()
    return out


def test_greedy_ids_text_and_counts(model: tuple[RecordingDecoder, Tokenizer]) -> None:
    decoder, tokenizer = model
    ids = tokenizer.encode(PROMPT)
    want = greedy(decoder, ids, 12)
    responses = list(stream_generate(decoder, tokenizer, PROMPT, 12))
    assert [r.token for r in responses] == want
    assert "".join(r.text for r in responses) == tokenizer.decode(want, skip_special_tokens=True)
    assert [r.finish_reason for r in responses] == [None] * 11 + ["length"]
    assert [r.generation_tokens for r in responses] == list(range(1, 13))
    assert decoder.fed == [ids, *([t] for t in want[:-1])], "every id is fed once, the last not at all"
    last = responses[-1]
    assert last.prompt_tokens == len(ids) and last.cached_tokens == 0
    assert last.prompt_tps > 0 and last.generation_tps > 0 and 0 < last.ttft_s < 60
    assert responses[0].generation_tps == 0.0
    assert last.peak_memory_bytes is not None and 2**20 < last.peak_memory_bytes < 2**40
    for r in responses:
        assert r.logprobs.shape == (decoder.config.vocab_size,) and r.logprobs.dtype == np.float32
        assert r.logprobs.argmax() == r.token
        assert np.exp(r.logprobs.astype(np.float64)).sum() == pytest.approx(1, abs=1e-5)
    assert generate(decoder, tokenizer, ids, 12) == "".join(r.text for r in responses)


def test_speeds_by_a_clock_that_moves_a_second_a_look(
    model: tuple[RecordingDecoder, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is looked at before and after the prompt, and once a token. What a cache held does not count as computed."""
    decoder, tokenizer = model
    ids, cache = tokenizer.encode(PROMPT), decoder.make_cache()
    decoder.step([ids[:2]], [cache])
    monkeypatch.setattr(stream, "time", SimpleNamespace(perf_counter=count().__next__))
    responses = list(stream_generate(decoder, tokenizer, ids, 5, cache=cache))
    assert {r.prompt_tps for r in responses} == {len(ids) - 2} and {r.ttft_s for r in responses} == {2}
    assert [r.generation_tps for r in responses] == [0, 1, 1, 1, 1]


def test_the_prompts_tokens_are_not_penalised(model: tuple[RecordingDecoder, Tokenizer]) -> None:
    """Presence counts what was generated alone: by hand, over the definition's logits."""
    decoder, tokenizer = model
    ids = tokenizer.encode(PROMPT)
    out: list[int] = []
    for _ in range(6):
        logits = decoder.step([ids + out], [decoder.make_cache()])[0].copy()
        logits[sorted(set(out))] -= np.float32(2)
        out.append(int(logits.argmax()))
    sampling = SamplingConfig(presence_penalty=2.0, logit_bias={ids[-1]: 0.0})
    responses = list(stream_generate(decoder, tokenizer, ids, 6, sampling=sampling))
    assert [r.token for r in responses] == out
    first = decoder.step([ids], [decoder.make_cache()])[0]
    assert np.array_equal(responses[0].scores, first)


def test_scores_stay_where_a_decoder_uses_its_buffer_again(model: tuple[RecordingDecoder, Tokenizer]) -> None:
    decoder, tokenizer = model
    want = [r.scores for r in stream_generate(decoder, tokenizer, PROMPT, 4)]
    buffer, step = np.empty_like(want[0]), decoder.step

    def again(*given: Any, **more: Any) -> list[np.ndarray]:
        buffer[:] = step(*given, **more)[0]
        return [buffer]

    decoder.step = again  # type: ignore[method-assign]
    try:
        got = [r.scores for r in stream_generate(decoder, tokenizer, PROMPT, 4)]
    finally:
        del decoder.step
    assert all(np.array_equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_chunks_of_the_prompt(size: int, model: tuple[RecordingDecoder, Tokenizer]) -> None:
    decoder, tokenizer = model
    ids = tokenizer.encode(PROMPT)
    seen: list[tuple[int, int]] = []
    options: dict[str, Any] = {"prefill_step_size": size, "progress": lambda done, total: seen.append((done, total))}
    tokens = [r.token for r in stream_generate(decoder, tokenizer, ids, 3, **options)]
    chunks = [ids[i : i + size] for i in range(0, len(ids), size)]
    assert decoder.fed[: len(chunks)] == chunks
    assert seen == [(0, len(ids))] + [(min(i + size, len(ids)), len(ids)) for i in range(0, len(ids), size)]
    assert tokens == greedy(decoder, ids, 3)


def test_a_cache_is_continued(model: tuple[RecordingDecoder, Tokenizer]) -> None:
    decoder, tokenizer = model
    ids = tokenizer.encode(PROMPT)
    want = greedy(decoder, ids, 4)
    cache = decoder.make_cache()
    decoder.step([ids[:3]], [cache])
    decoder.fed.clear()
    responses = list(stream_generate(decoder, tokenizer, ids, 4, cache=cache))
    assert [r.token for r in responses] == want and responses[0].cached_tokens == 3
    assert decoder.fed[0] == ids[3:]
    with pytest.raises(ConfigError, match="trim the cache first"):
        stream_generate(decoder, tokenizer, ids[:2], 4, cache=cache)


def test_an_end_token_stops_and_is_not_shown(model: tuple[RecordingDecoder, Tokenizer], tmp_path: Path) -> None:
    decoder, tokenizer = model
    ids = tokenizer.encode(PROMPT)
    want = greedy(decoder, ids, 12)
    end = want[5]
    first = want.index(end)
    ending, _ = pair(tmp_path, template=None, eos_token_ids=(end,))
    responses = list(stream_generate(ending, tokenizer, ids, 12))
    assert [r.token for r in responses] == want[: first + 1]
    assert responses[-1].finish_reason == "stop"
    assert "".join(r.text for r in responses) == tokenizer.decode(want[:first], skip_special_tokens=True)


def test_stop_strings_that_straddle_tokens(model: tuple[RecordingDecoder, Tokenizer]) -> None:
    decoder, tokenizer = model
    ids = tokenizer.encode(PROMPT)
    whole = generate(decoder, tokenizer, ids, 24)
    assert len(whole) > 20
    for at, size in ((4, 5), (10, 3), (1, 9)):
        stop = whole[at : at + size]
        done = Completion.of(stream_generate(decoder, tokenizer, ids, 24, stop=[stop, "absent"]))
        assert done.text == whole[: whole.find(stop)] and done.finish_reason == "stop"
    done = Completion.of(stream_generate(decoder, tokenizer, ids, 24, stop=[whole[-3:] + "never"]))
    assert done.text == whole and done.finish_reason == "length", "what was held back is given at the end"


def test_the_context_ends_the_text(model: tuple[RecordingDecoder, Tokenizer]) -> None:
    """A context of L holds a prompt of n and L - n + 1 new tokens, of which the last is never fed."""
    decoder, tokenizer = model
    ids = tokenizer.encode(PROMPT)
    for size in (len(ids), len(ids) + 5):
        responses = list(stream_generate(decoder, tokenizer, ids, 1000, max_kv_size=size))
        assert len(responses) == size - len(ids) + 1 and responses[-1].finish_reason == "length"
    most = decoder.config.max_position_embeddings
    filling = (ids * most)[: most - 2]
    assert len(list(stream_generate(decoder, tokenizer, filling, 1000))) == 3


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([5] * 257, {}, "257 tokens and the context holds 256; shorten the prompt$"),
        ([5] * 9, {"max_kv_size": 8}, "9 tokens and the context holds 8; .*--max-kv-size"),
        ([5], {"max_tokens": 0}, "max_tokens is 0; it must be at least 1"),
        ([5], {"max_tokens": -3}, "max_tokens is -3"),
        ([5], {"max_kv_size": 257}, "max_kv_size is 257; 1 to 256"),
        ([5], {"max_kv_size": 0}, "max_kv_size is 0"),
        ([5], {"prefill_step_size": 0}, "prefill_step_size is 0"),
        ([], {}, "the prompt is empty"),
        ([5, 100000], {}, "token 100000; this model has ids up to"),
        ([-1], {}, "token -1"),
        ([5], {"stop": [""]}, "stop is ''"),
    ],
)
def test_mistakes_are_told_before_anything_is_computed(
    prompt: list[int], options: dict[str, Any], message: str, model: tuple[RecordingDecoder, Tokenizer]
) -> None:
    decoder, tokenizer = model
    with pytest.raises(ConfigError, match=message):
        stream_generate(decoder, tokenizer, prompt, **options)
    assert decoder.fed == []


def test_an_empty_text_is_fine_where_a_bos_begins_it(model: tuple[RecordingDecoder, Tokenizer], tmp_path: Path) -> None:
    decoder, tokenizer = model
    assert len(list(stream_generate(decoder, tokenizer, "", 2))) == 2
    bare, plain = pair(tmp_path, template=None, bos=False)
    with pytest.raises(ConfigError, match="no token that begins a text"):
        stream_generate(bare, plain, "", 2)


def test_an_interrupt_leaves_what_was_made(model: tuple[RecordingDecoder, Tokenizer]) -> None:
    decoder, tokenizer = model
    ids = tokenizer.encode(PROMPT)
    want = greedy(decoder, ids, 6)
    decoder.interrupt_at = 5  # the prompt and four tokens: the fifth token is never made
    got: list[GenerationResponse] = []
    stream = stream_generate(decoder, tokenizer, ids, 50)
    with pytest.raises(KeyboardInterrupt):
        got.extend(stream)
    assert [r.token for r in got] == want[:4]
    assert list(stream) == []


def test_sampling_repeats_with_its_seed(model: tuple[RecordingDecoder, Tokenizer]) -> None:
    decoder, tokenizer = model

    def text(seed: int) -> str:
        return generate(decoder, tokenizer, PROMPT, 10, sampling=SamplingConfig(temp=1.5, top_k=50, seed=seed))

    assert text(1) == text(1) != text(2)


def test_the_penalty_sees_the_prompt_and_what_was_made(model: tuple[RecordingDecoder, Tokenizer]) -> None:
    decoder, tokenizer = model
    ids = tokenizer.encode(PROMPT)
    config = SamplingConfig(repetition_penalty=1e6, repetition_context_size=1000)
    tokens = [r.token for r in stream_generate(decoder, tokenizer, ids, 20, sampling=config)]
    assert len(set(tokens + ids)) == len(tokens) + len(set(ids))


@pytest.mark.parametrize("wrong", [-1, "size"])
def test_an_id_that_the_model_has_not_is_named(wrong: int | str, model: tuple[RecordingDecoder, Tokenizer]) -> None:
    """The first past the last one too."""
    decoder, tokenizer = model
    size = decoder.config.vocab_size
    token = size if wrong == "size" else -1
    with pytest.raises(ConfigError, match=f"holds token {token}; this model has ids up to {size - 1}"):
        stream_generate(decoder, tokenizer, [5, token], 1)
    assert list(stream_generate(decoder, tokenizer, [size - 1], 1))
