"""Every field of the official client's methods: honoured (elsewhere it is tested how), or refused by its name.

The client's own signatures are the list: a field that a new version brings must be put into the table.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from bitnet_mlx.models.decoder_cpu import CpuDecoder
from tests.serve.running import Running, model, serving
from tests.support import tiny_tokenizers as tiny

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
OURS = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}  # the client's own
# Field -> (values that are honoured, values that are refused). {"stream": True} and the like: fields that must go with it.
Table = dict[str, tuple[list[Any], list[Any]]]
BOTH: Table = {
    "model": (["test/model"], []),
    "frequency_penalty": ([0.5, -2, None], [2.5]),
    "logit_bias": ([{"65": 3}, {}], [{"65": 101}, {"5000": 1}]),
    "max_tokens": ([1, None], [-1]),
    "n": ([1, 2], [0, 17]),
    "presence_penalty": ([0.5, None], [-3]),
    "seed": ([1, -5, None], [1.5]),
    "stop": (["x", ["x", "y"], None], ["", [1]]),
    "stream": ([True, False], ["yes"]),
    "stream_options": ([], [{"include_usage": True}]),  # without stream; with it below
    "temperature": ([0, 1.5, None], [3]),
    "top_p": ([0.5, 1], [0, 1.5]),
    "user": (["me"], [5]),
}
COMPLETIONS: Table = {
    **BOTH,
    "prompt": (["hi", ["hi", "ho"], [65, 66], [[65], [66]]], [[], [-1], [[9999]], {"a": 1}]),
    "best_of": ([1, 3], [0, 17]),
    "echo": ([True, False], ["yes"]),
    "logprobs": ([0, 5], [21, True]),
    "max_tokens": ([1, None], [-1, 0]),
    "suffix": (["", None], ["end"]),
}
CHAT: Table = {
    **BOTH,
    "messages": ([[{"role": "developer", "content": [{"type": "text", "text": "x"}]}]],
                 [[], [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]]),
    "audio": ([None], [{"voice": "alloy", "format": "wav"}]),
    "function_call": ([None, "none"], ["auto"]),
    "functions": ([None, []], [[{"name": "f"}]]),
    "logprobs": ([True, False], [2]),
    "max_completion_tokens": ([1, None], [0]),
    "metadata": ([None, {}, {"a": "b"}], [{"a": 1}, "x"]),
    "modalities": ([["text"]], [["text", "audio"]]),
    "moderation": ([None], [{"model": "x"}]),
    "parallel_tool_calls": ([True, False], [1]),
    "prediction": ([None], [{"type": "content", "content": "x"}]),
    "prompt_cache_key": (["me"], [5]),
    "prompt_cache_options": ([None], [{"mode": "explicit"}]),
    "prompt_cache_retention": ([None], ["24h"]),
    "reasoning_effort": ([None], ["low", "none"]),
    "reasoning_format": ([None, "auto", "deepseek", "none"], ["deepseek-legacy", True]),
    "include_reasoning": ([True], [False]),
    "response_format": ([{"type": "text"}, {"type": "json_object"}], [{"type": "x"}]),
    "safety_identifier": (["me"], [5]),
    "service_tier": (["auto", "default"], ["flex"]),
    "store": ([False], [True]),
    "tool_choice": (["none", "auto"], ["required"]),  # without tools; with them below
    "tools": ([TOOLS, []], [[{"type": "custom", "custom": {"name": "x"}}]]),
    "top_logprobs": ([], [3]),  # without logprobs; with them below
    "verbosity": (["medium"], ["low"]),
    "web_search_options": ([None], [{}]),
}  # fmt: skip
EMBEDDINGS: Table = {
    "input": (["hi", ["hi", "ho"], [65, 66], [[65], [66, 67]]], [[], [9999], 5]),
    "model": (["test/model"], []),
    "dimensions": ([3, None], [0, 73]),
    "encoding_format": (["float", "base64"], ["int8"]),
    "user": (["me"], [5]),
}
EXTENSIONS: Table = {
    "top_k": ([0, 5], [-1]), "min_p": ([0.1], [2]), "repetition_penalty": ([1.2], [0]),
    "repetition_context_size": ([0, 40, None], [-1, 1.5]),
    "structured_outputs": ([{"regex": "a+"}, {"choice": ["a", "b"]}, {"json": {"type": "boolean"}}],
                           [{"grammar": "x"}, {"regex": "("}, {"choice": []}, {"regex": "a", "choice": ["a"]}, {}]),
    "min_tokens": ([None, 0], [1, False]), "ignore_eos": ([None, False], [True, 0]), "cache_prompt": ([True], [False, 1]),
    "repeat_penalty": ([1, 1.0], [1.1]), "xtc_probability": ([0, 0.0], [0.5]), "id_slot": ([-1], [0]),
    "something_new": ([None], [0]),
}  # fmt: skip
TOGETHER: list[tuple[str, dict[str, Any]]] = [
    ("chat", {"stream": True, "stream_options": {"include_usage": True}}),
    ("chat", {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}}),
    ("chat", {"tools": TOOLS, "tool_choice": "auto", "parallel_tool_calls": True}),
    ("chat", {"tools": TOOLS, "tool_choice": "required"}),
    ("chat", {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}}),
    ("chat", {"logprobs": True, "top_logprobs": 3}),
    ("completions", {"stream": True, "stream_options": {"include_usage": True}}),
    ("completions", {"echo": True, "max_tokens": 0, "logprobs": 1}),
    ("completions", {"response_format": {"type": "json_object"}}),
    ("completions", {"response_format": {"type": "json_object", "schema": {"type": "object"}}}),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    decoder, tokenizer = model(tmp_path_factory.mktemp("model"), tiny.CHAT_TOOLS, max_position_embeddings=512)
    with serving(CpuDecoder(decoder.weights), tokenizer, pooling="mean", max_tokens=4) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


def ask(client: openai.OpenAI, method: str, **fields: Any) -> Any:
    """The answer, a stream read to its end; fields that the client does not know travel in extra_body."""
    base: dict[str, Any] = {"model": "test/model"}
    if method == "embeddings":
        create: Any = client.embeddings.create
        base["input"] = "hi"
    elif method == "chat":
        create = client.chat.completions.create
        base |= {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    else:
        create = client.completions.create
        base |= {"prompt": "hi", "max_tokens": 2}
    if "max_completion_tokens" in fields:
        base.pop("max_tokens")
    known = inspect.signature(create).parameters
    extra = {name: value for name, value in fields.items() if name not in known or value is None or name == "stream"}
    plain = {name: value for name, value in fields.items() if name not in extra}
    streaming = extra.get("stream") is True
    if streaming:
        plain["stream"] = extra.pop("stream")
    answer = create(**{**base, **plain}, extra_body=extra)
    return list(answer) if streaming else answer


METHODS = {"chat": CHAT, "completions": COMPLETIONS, "embeddings": EMBEDDINGS}
CASES = [(method, field) for method, table in METHODS.items() for field in table]
CASES += [(method, field) for method in ("chat", "completions") for field in EXTENSIONS]


def test_no_field_of_the_client_is_left_out(client: openai.OpenAI) -> None:
    creates = {
        "chat": client.chat.completions.create, "completions": client.completions.create,
        "embeddings": client.embeddings.create,
    }  # fmt: skip
    for method, create in creates.items():
        assert set(inspect.signature(create).parameters) - OURS <= set(METHODS[method]), (
            method
        )  # an older client has fewer


@pytest.mark.parametrize(("method", "field"), CASES, ids=[f"{m}-{f}" for m, f in CASES])
def test_field(client: openai.OpenAI, method: str, field: str) -> None:
    honoured, refused = {**EXTENSIONS, **METHODS[method]}[field]
    ways: list[dict[str, Any]] = [{}] if method == "embeddings" or field == "stream" else [{}, {"stream": True}]
    for way in ways:
        for value in honoured:
            if field == "best_of" and way and value > 1:
                continue  # refused, below
            assert ask(client, method, **way, **{field: value})
        for value in refused:
            if field == "stream_options" and way:
                continue
            with pytest.raises(openai.BadRequestError) as caught:
                ask(client, method, **way, **{field: value})
            param = str(caught.value.param)
            assert param.replace("[", ".").split(".")[0] == field and param in str(caught.value), (value, param)


@pytest.mark.parametrize(("method", "fields"), TOGETHER, ids=[f"{m}-{'-'.join(f)}" for m, f in TOGETHER])
def test_fields_that_go_together(client: openai.OpenAI, method: str, fields: dict[str, Any]) -> None:
    assert ask(client, method, **fields)
    if "stream" not in fields:
        assert ask(client, method, **fields, stream=True)


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"best_of": 2, "stream": True}, "best_of"), ({"best_of": 1, "n": 2}, "best_of"),
     ({"echo": True, "max_tokens": -1}, "max_tokens"), ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
     ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation")],
)  # fmt: skip
def test_fields_that_do_not(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "completions", **fields)
    assert caught.value.param == param
