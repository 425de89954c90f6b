"""echo, the prompt's log probabilities, and best_of: the completions API's ways to rate texts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest

from bitnet_mlx.generation import SamplingConfig, stream_generate
from bitnet_mlx.generation.sampling import log_softmax
from bitnet_mlx.serve.answers import Answer, Choice, Kind
from bitnet_mlx.serve.work import Piece
from bitnet_mlx.tokenizer import load_tokenizer
from tests.serve.running import Running, WatchedDecoder, model, serving
from tests.support import tiny_tokenizers as tiny

PROMPT = "hello naïve world def f(x): return 12 + 345 你好 lazy dog class self " * 2  # more than a block of tokens


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(*model(tmp_path_factory.mktemp("model")), prefix_bytes=1 << 22) as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


def test_the_prompt_comes_first(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "test/model", "prompt": PROMPT, "max_tokens": 6}
    alone = client.completions.create(**options).choices[0].text
    got = client.completions.create(**options, echo=True)
    assert got.choices[0].text == PROMPT + alone
    assert got.usage and got.usage.completion_tokens == 6
    chunks = list(client.completions.create(**options, echo=True, stream=True))
    assert chunks[0].choices[0].text == PROMPT
    assert "".join(c.choices[0].text for c in chunks) == PROMPT + alone
    nothing = client.completions.create(**{**options, "max_tokens": 0}, echo=True)
    assert (nothing.choices[0].text, nothing.choices[0].finish_reason) == (PROMPT, "length")
    assert nothing.usage and nothing.usage.completion_tokens == 0


def test_log_probabilities_of_the_prompt(server: Running, client: openai.OpenAI) -> None:
    """By their definition, from one pass over all of it; the second request finds its beginning kept, and tells the same."""
    ids = server.tokenizer.encode(PROMPT)
    logits = server.decoder.step([ids], [server.decoder.make_cache()], "all")[0]
    assert len(ids) > 34
    rows = np.stack([log_softmax(row) for row in logits])
    options: dict[str, Any] = {
        "model": "test/model",
        "prompt": [PROMPT, ids],
        "max_tokens": 3,
        "echo": True,
        "logprobs": 2,
    }
    first = client.completions.create(**options)
    again = client.completions.create(**options)
    empty = client.completions.create(**{**options, "max_tokens": 0})
    for choice in (*first.choices, *again.choices, *empty.choices):
        told = choice.logprobs
        assert told and told.token_logprobs and told.tokens and told.text_offset and told.top_logprobs
        assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
        found = told.token_logprobs[1 : len(ids)]
        np.testing.assert_allclose(found, rows[np.arange(len(ids) - 1), ids[1:]], atol=1e-5)
        for table, row, token in zip(told.top_logprobs[1 : len(ids)], rows, ids[1:], strict=False):
            assert max(table.values()) == pytest.approx(float(row.max()), abs=1e-5) and len(table) in (1, 2, 3)
            assert any(v == pytest.approx(float(row[token]), abs=1e-5) for v in table.values())
        assert told.tokens[0] == "<|bos|>" and told.text_offset[:2] == [0, 0]
        assert choice.text.startswith(PROMPT)
    assert first.choices[0].text == again.choices[0].text == first.choices[1].text
    assert [len(c.logprobs.tokens or []) for c in empty.choices] == [len(ids)] * 2  # type: ignore[union-attr]
    chunks = client.completions.create(**{**options, "prompt": PROMPT}, stream=True)
    parts = [c.choices[0].logprobs for c in chunks]
    assert [v for p in parts for v in p.token_logprobs] == first.choices[0].logprobs.token_logprobs  # type: ignore[union-attr]
    assert [v for p in parts for v in p.text_offset] == first.choices[0].logprobs.text_offset  # type: ignore[union-attr]


def test_the_best_of_several(server: Running, client: openai.OpenAI) -> None:
    prompts = ["hello world", "x = 1"]
    got = client.completions.create(
        model="test/model", prompt=prompts, max_tokens=4, temperature=1.4, seed=2, n=2, best_of=5
    )
    want = []
    for at, prompt in enumerate(prompts):
        rated = []
        for i in range(5):
            sampling = SamplingConfig(temp=1.4, seed=2 + 5 * at + i)
            run = list(stream_generate(server.decoder, server.tokenizer, prompt, 4, sampling=sampling))
            rated.append((np.mean([r.logprobs[r.token] for r in run]), "".join(r.text for r in run)))
        want += [text for _, text in sorted(rated, reverse=True)[:2]]
    assert [c.text for c in got.choices] == want and [c.index for c in got.choices] == [0, 1, 2, 3]
    assert len(set(want)) == 4 and all(c.logprobs is None for c in got.choices)
    assert got.usage and got.usage.completion_tokens == 2 * 5 * 4


def test_texts_are_rated_by_the_mean_of_their_tokens() -> None:
    """By the sum a short text would always win."""
    long, short = (Choice([Piece("x", 5, logprob=value)] * count) for value, count in ((-0.5, 4), (-0.9, 1)))
    ended = Choice([*short.pieces, Piece("", 1, "stop", ended=True)])
    assert short.rate == ended.rate == -0.9 < long.rate == -0.5


def test_a_token_that_cannot_come_is_told_by_a_number(server: Running) -> None:
    """JSON has no infinity; OpenAI tells -9999."""
    answer = Answer(Kind(chat=True, logprobs=True), "test/model", server.tokenizer, [1])
    never = Piece("x", 5, "length", logprob=-np.inf, top=[(6, -0.0), (7, -np.inf)])
    told = json.loads(json.dumps(answer.whole([Choice([never])]), allow_nan=False))
    [content] = told["choices"][0]["logprobs"]["content"]
    assert content["logprob"] == -9999.0 and [t["logprob"] for t in content["top_logprobs"]] == [0.0, -9999.0]


def test_a_text_goes_on_where_the_prompt_ends(tmp_path: Any) -> None:
    """sentencepiece's leading space: the first word of what follows keeps it after an echoed prompt."""
    tokenizer = load_tokenizer(tiny.sentencepiece_model(tmp_path))
    decoder = WatchedDecoder(tokenizer.vocab_size)
    ids = tokenizer.encode("hello world")
    with serving(decoder, tokenizer) as server, server.client() as client:
        got = client.completions.create(model="test/model", prompt="hello", max_tokens=8, echo=True)
        made = list(stream_generate(decoder, tokenizer, "hello", 8))
    whole = tokenizer.decode([*tokenizer.encode("hello"), *(r.token for r in made)], skip_special_tokens=True)
    assert got.choices[0].text == whole and len(ids) > 2
