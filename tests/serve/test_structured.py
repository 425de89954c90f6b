"""Answers that must be JSON or match an expression, on the way in, while they are written, and where they cannot be."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import httpx
import numpy as np
import openai
import pytest
from pydantic import BaseModel, Field

from bitnet_mlx.generation import SamplingConfig, stream_generate
from bitnet_mlx.generation.grammar import Constraint, Grammars
from bitnet_mlx.generation.sampling import Sampler
from bitnet_mlx.models.decoder_cpu import CpuDecoder
from bitnet_mlx.tokenizer import load_tokenizer
from tests.serve.running import Running, model, serving
from tests.support import tiny_tokenizers as tiny

MESSAGES: list[Any] = [{"role": "user", "content": "hello world"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "ship": {"enum": ["tug", "naïve brig"]},
        "crew": {"type": "integer", "minimum": 0, "maximum": 99},
        "ready": {"$ref": "#/$defs/flag"},
    },
    "required": ["ship", "crew", "ready"],
    "additionalProperties": False,
    "$defs": {"flag": {"type": "boolean"}},
}
BLANKS = {str(i): -50 for i in (201, 202, 205, 224)}  # tab, line feed, carriage return, space: they cost time
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "ship", "schema": SCHEMA, "strict": True}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    decoder, tokenizer = model(tmp_path_factory.mktemp("model"), eos_token_ids=(1,))
    with serving(CpuDecoder(decoder.weights), tokenizer) as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


def obeys(text: str) -> bool:
    value = json.loads(text)
    return (
        value.keys() == {"ship", "crew", "ready"}
        and value["ship"] in ("tug", "naïve brig")
        and type(value["crew"]) is int
        and 0 <= value["crew"] <= 99
        and type(value["ready"]) is bool
    )


def test_every_choice_obeys_streamed_or_not(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {
        "model": "test/model", "messages": MESSAGES, "response_format": FORMAT, "temperature": 1.5, "seed": 4, "n": 3,
        "max_tokens": 200, "logprobs": True, "top_logprobs": 2, "logit_bias": BLANKS,
    }  # fmt: skip
    reply = client.chat.completions.create(**options)
    texts = [choice.message.content or "" for choice in reply.choices]
    assert len(set(texts)) == 3 and all(map(obeys, texts)), texts
    assert [choice.finish_reason for choice in reply.choices] == ["stop"] * 3
    streamed, ends = [""] * 3, [""] * 3
    for chunk in client.chat.completions.create(**options, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
            ends[choice.index] += choice.finish_reason or ""
    assert (streamed, ends) == (texts, ["stop"] * 3)
    # The model's own log probabilities: what it would have liked better is told as well.
    told = reply.choices[0].logprobs.content  # type: ignore[union-attr]
    assert told and b"".join(bytes(t.bytes or []) for t in told).decode() == texts[0]
    assert any(t.token not in [top.token for top in t.top_logprobs] for t in told)
    free = {**options, "response_format": {"type": "text"}, "max_tokens": 20}
    plain = client.chat.completions.create(**free).choices[0].message.content
    assert plain not in texts


class Ship(BaseModel):
    ship: Literal["tug", "brig"]
    crew: list[Annotated[int, Field(ge=0, le=9)]] = Field(max_length=2)
    home: Port | None


class Port(BaseModel):
    deep: bool


def test_the_clients_own_helper(client: openai.OpenAI) -> None:
    """It sends the schema of a pydantic class, and reads the answer as one."""
    got = client.chat.completions.parse(
        model="test/model", messages=MESSAGES, response_format=Ship, temperature=1.5, seed=6, max_tokens=150
    )
    ship = got.choices[0].message.parsed
    assert isinstance(ship, Ship) and got.choices[0].finish_reason == "stop"


def test_an_object_an_expression_and_a_stop(server: Running, client: openai.OpenAI) -> None:
    options: dict[str, Any] = {
        "model": "test/model",
        "prompt": "x = ",
        "temperature": 1.5,
        "seed": 1,
        "max_tokens": 150,
    }
    got = client.completions.create(
        **options, extra_body={"structured_outputs": {"regex": "[a-f]{4}-(hello )?[0-9]+;"}}
    )
    assert re.fullmatch("[a-f]{4}-(hello )?[0-9]+;", got.choices[0].text) and got.choices[0].finish_reason == "stop"
    stopped = client.completions.create(**options, stop="-", extra_body={"structured_outputs": {"regex": "[a-f]{4}-x"}})
    assert re.fullmatch("[a-f]{4}", stopped.choices[0].text)
    bias = {str(i): 20 for i in server.tokenizer.encode("}", add_special_tokens=False)}
    body = {"response_format": {"type": "json_object"}}
    anything = client.completions.create(**options, logit_bias=bias, extra_body=body).choices[0]
    assert anything.finish_reason == "stop" and isinstance(json.loads(anything.text), dict)
    short = client.completions.create(**{**options, "max_tokens": 3}, extra_body={"response_format": FORMAT}).choices[0]
    assert short.finish_reason == "length" and short.text.startswith("{")


TEXTS = ["aye", 'nay "x"', "a\\b\n", "über", "\x01"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_choice_of_texts_and_schemas_of_other_forms(server: Running, client: openai.OpenAI, text: str) -> None:
    """vLLM's and llama.cpp's ways to say it. Biased towards one text, that is the answer, to the last letter."""
    bias = {str(i): 30 for i in server.tokenizer.encode(text, add_special_tokens=False)}
    options: dict[str, Any] = {"model": "test/model", "prompt": "x = ", "max_tokens": 100, "logit_bias": bias}
    got = client.completions.create(**options, extra_body={"structured_outputs": {"choice": TEXTS}}).choices[0]
    assert (got.text, got.finish_reason) == (text, "stop")
    for form in (
        {"structured_outputs": {"json": SCHEMA}},
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
    ):
        answer = client.completions.create(**{**options, "logit_bias": BLANKS}, extra_body=form).choices[0]
        assert obeys(answer.text) and answer.finish_reason == "stop"


def test_the_library_writes_the_same(server: Running, client: openai.OpenAI) -> None:
    """One run of generation with the grammar, against the batch."""
    decoder, tokenizer = server.decoder, server.tokenizer
    grammar = Grammars(tokenizer, decoder.config.vocab_size, tokenizer.eos_token_ids).json_schema(SCHEMA)
    sampler = Sampler(SamplingConfig(temp=1.5, seed=9), grammar.begin())
    run = list(stream_generate(decoder, tokenizer, "x = ", 200, sampling=sampler))
    want = "".join(r.text for r in run)
    assert obeys(want) and run[-1].finish_reason == "stop"
    got = client.completions.create(
        model="test/model",
        prompt="x = ",
        max_tokens=200,
        temperature=1.5,
        seed=9,
        extra_body={"response_format": FORMAT},
    )
    assert got.choices[0].text == want


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {"type": "string"}}, "not"),
        ({"type": "ship"}, "Invalid type: ship"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "integer", "minimum": 3, "maximum": 1}, "Unsatisfiable"),
        ({"$ref": "http://127.0.0.1:1/schema"}, "127.0.0.1:1"),
        ({"not": {}, "x-guidance": {"lenient": True}}, "not"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "NoExtension"),
        (
            {"anyOf": [{"const": i} for i in range(201)]},
            "has 201 alternatives",
        ),
    ],
)
def test_schemas_that_cannot_be_enforced(server: Running, schema: dict[str, Any], said: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {"model": "test/model", "messages": MESSAGES, "response_format": form}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, "response_format", "invalid_value")
    assert said in error["message"] and "cannot be enforced" in error["message"]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_object", "json_schema": {"name": "x"}}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response_format.json_schema.name",
        ),
        ({"response_format": FORMAT, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "x"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"json": {"not": {}}}}, "structured_outputs"),
        ({"response_format": {"type": "text", "schema": {}}}, "response_format.schema"),
    ],
)
def test_forms_that_are_wrong(server: Running, changes: dict[str, Any], param: str) -> None:
    body = {"model": "test/model", "messages": MESSAGES, "max_tokens": 1, **changes}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("make", [tiny.byte_level, tiny.fallback_json, tiny.sentencepiece_model])
@pytest.mark.parametrize("ends", [True, False])
def test_every_kind_of_vocabulary(tmp_path: Any, make: Any, ends: bool) -> None:
    """Random choices among what is allowed always end in JSON of the schema; more ids than tokens are never chosen."""
    tokenizer = load_tokenizer(make(tmp_path))
    size = tokenizer.vocab_size + 5
    grammar = Grammars(tokenizer, size, tokenizer.eos_token_ids if ends else frozenset()).json_schema(SCHEMA)
    rng = np.random.default_rng(0)
    for _ in range(3):
        constraint, ids = grammar.begin(), []
        while not constraint.complete:
            allowed = np.flatnonzero(np.isfinite(constraint.masked(np.zeros(size, np.float32))))
            assert not tokenizer.special_ids & set(allowed.tolist()) and allowed.max() < tokenizer.vocab_size
            ids.append(int(rng.choice(allowed)))
            constraint.accept(ids[-1])
        assert obeys(tokenizer.decode(ids, skip_special_tokens=True))


def test_a_grammar_that_failed_is_not_complete() -> None:
    """Its text has no end then, but an error."""
    for failed in (False, True):
        matcher = SimpleNamespace(is_stopped=lambda: True, is_error=lambda failed=failed: failed)
        assert Constraint(matcher, 9).complete is not failed
