"""The official client against a real server: every field, streaming and not, against the library's own generation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest

from bitnet_mlx.generation import Completion, SamplingConfig, stream_generate
from bitnet_mlx.generation.sampling import log_softmax
from tests.serve.running import Running, model, serving

PROMPT = "hello world def"
MESSAGES: list[Any] = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello world"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(*model(tmp_path_factory.mktemp("model"))) as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


def alone(server: Running, prompt: str | list[int], count: int, stop: Any = (), **sampling: Any) -> Completion:
    """The same text from one run of the library."""
    config = SamplingConfig(**sampling)
    return Completion.of(stream_generate(server.decoder, server.tokenizer, prompt, count, sampling=config, stop=stop))


def streamed(chunks: Any) -> list[tuple[str, str | None]]:
    """(text, finish reason) of each choice of a stream of completions."""
    texts: dict[int, str] = {}
    finish: dict[int, str | None] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            part = choice.text if hasattr(choice, "text") else choice.delta.content or ""
            texts[choice.index] = texts.get(choice.index, "") + part
            finish[choice.index] = choice.finish_reason or finish.get(choice.index)
    return [(texts[i], finish[i]) for i in sorted(texts)]


CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"temperature": 0.8, "seed": 7}, {"temp": 0.8, "seed": 7}),
    ({"temperature": 1.5, "seed": 1, "top_p": 0.3}, {"temp": 1.5, "seed": 1, "top_p": 0.3}),
    ({"temperature": 1.5, "seed": -1, "extra_body": {"top_k": 3}}, {"temp": 1.5, "seed": 2**64 - 1, "top_k": 3}),
    ({"temperature": 1.5, "seed": 5, "extra_body": {"min_p": 0.2}}, {"temp": 1.5, "seed": 5, "min_p": 0.2}),
    ({"extra_body": {"repetition_penalty": 0.6}}, {"repetition_penalty": 0.6}),
    (
        {"extra_body": {"repetition_penalty": 0.6, "repetition_context_size": 2}},
        {"repetition_penalty": 0.6, "repetition_context_size": 2},
    ),
    ({"presence_penalty": -2}, {"presence_penalty": -2}),
    ({"frequency_penalty": -1.5}, {"frequency_penalty": -1.5}),
    ({"logit_bias": {"70": 100}}, {"logit_bias": {70: 100.0}}),
]


@pytest.mark.parametrize(("asked", "sampling"), CASES, ids=[",".join(c[1]) for c in CASES])
def test_sampling_fields(
    server: Running, client: openai.OpenAI, asked: dict[str, Any], sampling: dict[str, Any]
) -> None:
    want = alone(server, PROMPT, 12, **sampling)
    options: dict[str, Any] = {"model": "test/model", "prompt": PROMPT, "max_tokens": 12, **asked}
    got = client.completions.create(**options)
    assert [(c.text, c.finish_reason) for c in got.choices] == [(want.text, "length")]
    assert got.usage is not None
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (want.prompt_tokens, 12)
    assert streamed(client.completions.create(**options, stream=True)) == [(want.text, "length")]
    ids = server.tokenizer.apply_chat_template(MESSAGES)
    said = alone(server, ids, 12, **sampling)
    options = {"model": "test/model", "messages": MESSAGES, "max_completion_tokens": 12, **asked}
    reply = client.chat.completions.create(**options)
    assert [(c.message.content, c.message.role) for c in reply.choices] == [(said.text, "assistant")]
    assert streamed(client.chat.completions.create(**options, stream=True)) == [(said.text, "length")]


def test_the_cases_differ(server: Running) -> None:
    """Otherwise a field that is ignored would pass."""
    texts = [alone(server, PROMPT, 12, **sampling).text for _, sampling in CASES]
    assert len(set(texts)) == len(texts)
    warm = [{k: v for k, v in s.items() if k in ("temp", "seed")} for _, s in CASES if len(s) > 2]
    assert all(alone(server, PROMPT, 12, **s).text not in texts for s in warm)


@pytest.mark.parametrize("several", [False, True])
def test_stop(server: Running, client: openai.OpenAI, several: bool) -> None:
    whole = alone(server, PROMPT, 30).text
    stop = whole[10:12]
    want = alone(server, PROMPT, 30, stop=[stop])
    assert want.finish_reason == "stop" and whole.startswith(want.text)
    options: dict[str, Any] = {"model": "test/model", "prompt": PROMPT, "max_tokens": 30}
    options["stop"] = ["never this", stop] if several else stop
    got = client.completions.create(**options).choices[0]
    assert (got.text, got.finish_reason) == (want.text, "stop")
    assert streamed(client.completions.create(**options, stream=True)) == [(want.text, "stop")]


def test_n_choices_and_several_prompts(server: Running, client: openai.OpenAI) -> None:
    prompts = [PROMPT, server.tokenizer.encode("x = 1")]
    options: dict[str, Any] = {"model": "test/model", "max_tokens": 6, "temperature": 1.2, "seed": 3, "n": 2}
    got = client.completions.create(prompt=prompts, **options)  # type: ignore[call-overload]
    want = [alone(server, prompts[i // 2], 6, temp=1.2, seed=3 + i) for i in range(4)]
    assert [c.index for c in got.choices] == [0, 1, 2, 3]
    assert [c.text for c in got.choices] == [w.text for w in want]
    assert got.usage.prompt_tokens == want[0].prompt_tokens + want[2].prompt_tokens
    assert got.usage.completion_tokens == 24 and got.usage.total_tokens == 24 + got.usage.prompt_tokens
    chunks = client.completions.create(prompt=prompts, stream=True, **options)  # type: ignore[call-overload]
    assert streamed(chunks) == [(w.text, "length") for w in want]


def test_usage_comes_last_when_asked_for(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "test/model", "messages": MESSAGES, "max_tokens": 4, "stream": True}
    whole = client.chat.completions.create(**{**options, "stream": False})
    chunks = list(client.chat.completions.create(**options, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.usage for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    usage = chunks[-1].usage
    assert chunks[-1].choices == [] and usage is not None and whole.usage is not None
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(usage, name) == getattr(whole.usage, name)
    # The prompt's first block was kept when the answer before was made.
    assert usage.prompt_tokens_details is not None and usage.prompt_tokens_details.cached_tokens == 32
    assert len({c.id for c in chunks}) == 1
    assert all(c.usage is None for c in client.chat.completions.create(**options))


def test_logprobs_are_the_models(server: Running, client: openai.OpenAI) -> None:
    ids = server.tokenizer.apply_chat_template(MESSAGES)
    options: dict[str, Any] = {
        "model": "test/model",
        "messages": MESSAGES,
        "max_tokens": 5,
        "temperature": 1,
        "seed": 2,
    }
    reply = client.chat.completions.create(**options, logprobs=True, top_logprobs=4)
    found = reply.choices[0].logprobs.content  # type: ignore[union-attr]
    assert found is not None and len(found) == 5
    assert b"".join(bytes(t.bytes or []) for t in found).decode("utf-8", "replace") == reply.choices[0].message.content
    run = list(stream_generate(server.decoder, server.tokenizer, ids, 5, sampling=SamplingConfig(temp=1, seed=2)))
    for one, step in zip(found, run, strict=True):
        logits = server.decoder.step([ids], [server.decoder.make_cache()])[0]  # the definition: everything again
        logprobs = log_softmax(logits)
        assert one.logprob == pytest.approx(logprobs[step.token], abs=1e-6)
        best = np.argsort(-logprobs, kind="stable")[:4]
        assert [t.logprob for t in one.top_logprobs] == pytest.approx([float(logprobs[i]) for i in best], abs=1e-6)
        pieces = [server.tokenizer.pieces[int(i)] for i in best if int(i) not in server.tokenizer.special_ids]
        assert [bytes(t.bytes or []) for t in one.top_logprobs if not t.token.startswith("<|")] == pieces
        ids = [*ids, step.token]
    chunks = client.chat.completions.create(**options, logprobs=True, top_logprobs=4, stream=True)
    again = [t for c in chunks for ch in c.choices if ch.logprobs for t in ch.logprobs.content or []]
    assert again == found
    plain = client.completions.create(
        model="test/model", prompt=server.tokenizer.apply_chat_template(MESSAGES), max_tokens=5, temperature=1, seed=2, logprobs=1
    ).choices[0].logprobs  # fmt: skip
    assert plain is not None and plain.token_logprobs == [t.logprob for t in found]
    assert plain.tokens == [t.token for t in found]
    assert plain.text_offset == [sum(len(t) for t in plain.tokens[:i]) for i in range(5)]


def test_models(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["test/model"]
    assert client.models.retrieve("test/model").id == "test/model"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


def test_content_parts_roles_and_nulls(server: Running, client: openai.OpenAI) -> None:
    parts: list[Any] = [
        {"role": "developer", "content": "be brief", "name": None},
        {"role": "user", "content": [{"type": "text", "text": "hello "}, {"type": "text", "text": "world"}]},
    ]
    nothing = {
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "prediction": None,
        "stop": None,
    }
    got = client.chat.completions.create(
        model="test/model", messages=parts, max_tokens=5, user="me", extra_body=nothing
    )
    assert got.choices[0].message.content == alone(server, server.tokenizer.apply_chat_template(MESSAGES), 5).text


def test_an_answer_is_accepted_back(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="test/model", messages=MESSAGES, max_tokens=3)
    history = [*MESSAGES, reply.choices[0].message.model_dump(), {"role": "user", "content": "more"}]
    assert client.chat.completions.create(model="test/model", messages=history, max_tokens=3).choices[0].finish_reason


def test_an_end_token_ends_the_text(tmp_path: Any) -> None:
    decoder, tokenizer = model(tmp_path)
    fourth = [r.token for r in stream_generate(decoder, tokenizer, PROMPT, 4)][3]
    with serving(*model(tmp_path, eos_token_ids=(fourth,))) as server, server.client() as client:
        got = client.completions.create(model="test/model", prompt=PROMPT, max_tokens=50, logprobs=0)
        want = alone(server, PROMPT, 50)
    assert (got.choices[0].text, got.choices[0].finish_reason) == (want.text, "stop")
    assert got.usage is not None and got.usage.completion_tokens == want.generation_tokens <= 4
    assert got.choices[0].logprobs is not None
    assert len(got.choices[0].logprobs.tokens or []) == want.generation_tokens - 1
