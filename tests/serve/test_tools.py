"""Tools: what the template is given, what is read out of a text, what is enforced, and the same of it streamed or not."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_mlx import _mlxlm
from bitnet_mlx.models.decoder_cpu import CpuDecoder
from bitnet_mlx.serve.calls import CallReader
from bitnet_mlx.serve.tools import ToolFormat, tool_format
from bitnet_mlx.tokenizer import load_tokenizer
from tests.serve.running import Running, WatchedDecoder, model, serving
from tests.support import tiny_tokenizers as tiny

CHAT = "/v1/chat/completions"
MESSAGES: list[Any] = [{"role": "user", "content": "hello world"}]
PLACE = {"type": "object", "properties": {"place": {"$ref": "#/$defs/p"}}, "required": ["place"],
         "additionalProperties": False, "$defs": {"p": {"enum": ["sea", "port"]}}}  # fmt: skip
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "sail", "description": "go", "parameters": PLACE}},
    {"type": "function", "function": {"name": "wait_here"}},
]
STRICT: list[Any] = [{"type": "function", "function": {"name": "sail", "strict": True, "parameters": PLACE}}]


BLANKS = {str(i): -50.0 for i in (201, 202, 205, 224)}  # tab, line feed, carriage return, space
MARKS = {"421": {"content": "<tool_call>", "special": True}, "422": {"content": "</tool_call>", "special": False}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The marks are tokens, one of them special."""
    settings = {"chat_template": tiny.CHAT_TOOLS, "added_tokens_decoder": MARKS}
    tokenizer = load_tokenizer(tiny.byte_level(tmp_path_factory.mktemp("model"), settings=settings))
    decoder = WatchedDecoder(tokenizer.vocab_size, eos_token_ids=(1,), max_position_embeddings=1024)
    with serving(CpuDecoder(decoder.weights), tokenizer) as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


def asked(**changes: Any) -> dict[str, Any]:
    """A request; blank space, which costs time, is made unlikely."""
    return {
        "model": "test/model", "messages": MESSAGES, "tools": TOOLS, "temperature": 1.2, "seed": 5, "max_tokens": 120,
        "logit_bias": BLANKS, **changes,
    }  # fmt: skip


def summed(chunks: Any) -> tuple[str, list[tuple[str, str]], list[str]]:
    """(content, calls, finish reasons) of a stream, put together as OpenAI's documentation says."""
    content, calls, ends = "", {}, []
    for chunk in chunks:
        for choice in chunk.choices:
            content += choice.delta.content or ""
            for part in choice.delta.tool_calls or []:
                call = calls.setdefault(part.index, SimpleNamespace(name="", arguments="", id=None))
                call.id = call.id or part.id
                call.name += part.function.name or ""
                call.arguments += part.function.arguments or ""
            ends += [choice.finish_reason] if choice.finish_reason else []
    assert all(call.id for call in calls.values())
    return content, [(calls[i].name, calls[i].arguments) for i in sorted(calls)], ends


@pytest.mark.parametrize(
    ("choice", "parallel", "end"),
    [
        ("required", True, "tool_calls"),
        ("required", False, "tool_calls"),
        ({"type": "function", "function": {"name": "sail"}}, True, "stop"),
    ],
)
def test_calls_that_must_be_made(client: openai.OpenAI, choice: Any, parallel: bool, end: str) -> None:
    options = asked(tool_choice=choice, parallel_tool_calls=parallel)
    reply = client.chat.completions.create(**options).choices[0]
    calls = [(c.function.name, c.function.arguments) for c in reply.message.tool_calls or []]  # type: ignore[union-attr]
    assert calls and (parallel or len(calls) == 1) and reply.message.content is None
    for name, arguments in calls:
        assert name in ("sail", "wait_here") and isinstance(json.loads(arguments), dict)
        assert name != "sail" or json.loads(arguments)["place"] in ("sea", "port")
        assert isinstance(choice, str) or name == "sail"
    assert reply.finish_reason in (end, "length") and (parallel or reply.finish_reason == end)
    assert summed(client.chat.completions.create(**options, stream=True)) == ("", calls, [reply.finish_reason])


def test_the_clients_own_stream_helper(client: openai.OpenAI) -> None:
    """It puts the chunks together and reads the arguments of a strict function by its schema."""
    options = asked(tools=STRICT, tool_choice="required", parallel_tool_calls=False)
    with client.chat.completions.stream(**options) as stream:
        events = list(stream)
        reply = stream.get_final_completion().choices[0]
    (call,) = reply.message.tool_calls or []
    pieces = [event.arguments_delta for event in events if event.type == "tool_calls.function.arguments.delta"]
    assert len(pieces) > 2 and "".join(pieces) == call.function.arguments, "a client shows them as they are written"
    assert "tool_calls.function.arguments.done" in {event.type for event in events}
    assert reply.finish_reason == "tool_calls"
    assert call.function.name == "sail" and call.function.parsed_arguments["place"] in ("sea", "port")  # type: ignore[index]


def test_a_call_that_is_cut_short(client: openai.OpenAI) -> None:
    """As OpenAI's: the call as far as it was written, and what cut it; the same streamed and whole."""
    whole = client.chat.completions.create(**asked(tools=STRICT, tool_choice="required", parallel_tool_calls=False))
    assert whole.usage is not None
    (all_of_it,) = whole.choices[0].message.tool_calls or []
    text = all_of_it.function.arguments  # type: ignore[union-attr]
    for cut, end in (({"max_tokens": whole.usage.completion_tokens - 16}, "length"), ({"stop": text[5:9]}, "stop")):
        options = {**asked(tools=STRICT, tool_choice="required", parallel_tool_calls=False), **cut}
        reply = client.chat.completions.create(**options).choices[0]
        (call,) = reply.message.tool_calls or []
        part = call.function.arguments  # type: ignore[union-attr]
        assert (reply.finish_reason, reply.message.content) == (end, None)
        assert text.startswith(part) and len(part) < len(text) and (end == "length" or part == text[:5])
        streamed = client.chat.completions.create(**options, stream=True)
        assert summed(streamed) == ("", [("sail", part)], [end])


def test_auto_is_free_and_strict_calls_are_right(server: Running, client: openai.OpenAI) -> None:
    """The mark is made likely; a strict function's call must then come out well, and one call is the last."""
    mark = {**BLANKS, "421": 8.0}
    free = client.chat.completions.create(**asked(max_tokens=12)).choices[0]
    assert free.message.content and free.finish_reason == "length" and not free.message.tool_calls
    options = asked(tools=STRICT, logit_bias=mark, parallel_tool_calls=False, seed=3)
    reply = client.chat.completions.create(**options).choices[0]
    (call,) = reply.message.tool_calls or []
    assert json.loads(call.function.arguments)["place"] in ("sea", "port")  # type: ignore[union-attr]
    assert reply.finish_reason == "tool_calls"
    content, calls, ends = summed(client.chat.completions.create(**options, stream=True))
    assert (content, len(calls), ends) == (reply.message.content or "", 1, ["tool_calls"])
    either = asked(tools=STRICT, logit_bias=mark, response_format={"type": "json_object"}, seed=3,
                   parallel_tool_calls=False)  # fmt: skip
    reply = client.chat.completions.create(**either).choices[0]
    assert reply.message.content is None
    assert [c.function.name for c in reply.message.tool_calls or []][:1] == ["sail"]  # type: ignore[union-attr]


def test_the_template_is_given_tools_calls_and_results(server: Running, client: openai.OpenAI) -> None:
    history: list[Any] = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "sail", "arguments": '{"place": "sea"}'}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "done"}], "name": "sail"},
    ]  # fmt: skip
    for tools, choice in ((TOOLS, "auto"), (TOOLS, "none"), ([], "none")):
        got = client.chat.completions.create(**asked(messages=history, tools=tools, tool_choice=choice, max_tokens=1))
        text = server.tokenizer.render_chat_template(
            [
                MESSAGES[0],
                {"role": "assistant", "content": "", "tool_calls": [
                    {"function": {"name": "sail", "arguments": {"place": "sea"}}}]},
                {"role": "tool", "content": "done"},
            ],
            tools=TOOLS if choice == "auto" else None,
        )  # fmt: skip
        assert '{"name": "sail", "arguments": {"place": "sea"}}' in text and ('"description"' in text) == (
            choice == "auto"
        )
        assert got.usage and got.usage.prompt_tokens == len(server.tokenizer.encode(text))


FORM = ToolFormat(
    "json_tools",
    "<tool_call>",
    "</tool_call>",
    _mlxlm.module("tool_parsers.json_tools").parse_tool_call,
    frozenset(),
    {},
)
CALL = '<tool_call>\n{"name": "sail", "arguments": {"place": "über"}}\n</tool_call>'
ARGUMENTS = '{"place": "über"}'


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("no call < at <tool all ", "no call < at <tool all ", 0),
        (CALL, "", 1),
        (f"\n{CALL}\n{CALL}\n", "", 2),
        (f"Well.\n{CALL} Then.", "Well. Then.", 1),
        ("x \n<tool_call>no</tool_call> y ", "x \n<tool_call>no</tool_call> y ", 0),
        (
            '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
            '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
            0,
        ),
        (f"{CALL}<tool_call>[1]", "<tool_call>[1]", 1),
        (CALL.removesuffix("</tool_call>"), "", 1),
        ("<tool_call><tool_call>", "<tool_call><tool_call>", 0),
    ],
)
@given(cuts=st.lists(st.integers(0, 120), max_size=12))
def test_what_is_read_does_not_depend_on_how_it_comes(text: str, content: str, calls: int, cuts: list[int]) -> None:
    reader = CallReader(FORM, TOOLS)
    ends = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    said = [reader.feed(text[a:b]) for a, b in itertools.pairwise(ends)] + [reader.feed("", last=True)]
    assert "".join(s.content for s in said) == content
    made = [call for s in said for call in s.calls]
    assert [call["index"] for call in made] == list(range(calls))
    assert all(call["function"] == {"name": "sail", "arguments": ARGUMENTS} for call in made)


LONG = '{"text": "}] \\\\\\" </tool_call> {", "at": [{"x": 1}, 2]}'
WRITTEN = f'<tool_call>\n{{"name":  "sail",\n"arguments": {LONG} }}</tool_call>'
CUT = WRITTEN[: WRITTEN.index('"x"')]


@pytest.mark.parametrize(
    ("text", "content", "arguments"),
    [
        (f"Well.\n{WRITTEN}\n{WRITTEN}", "Well.", [LONG, LONG]),
        (f"{WRITTEN} {CUT}", "", [LONG, LONG[: LONG.index('"x"')]]),
        (WRITTEN[:20], WRITTEN[:20], []),
    ],
    ids=["whole", "cut short", "cut before its arguments"],
)
@given(cuts=st.lists(st.integers(0, 200), max_size=12))
def test_what_is_enforced_is_told_as_it_is_written(
    text: str, content: str, arguments: list[str], cuts: list[int]
) -> None:
    """Names first, and no letter of the arguments later than it was written."""
    reader = CallReader(FORM, TOOLS, enforced=True)
    ends = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    said = [reader.feed(text[a:b]) for a, b in itertools.pairwise(ends)] + [reader.feed("", last=True)]
    told: list[dict[str, Any]] = []
    for part, end in zip(said, [*ends[1:], len(text)], strict=True):
        for call in part.calls:
            assert ("name" in call["function"]) == (call["index"] == len(told)) == ("id" in call)
            told += [{**call["function"], "arguments": ""}] if call["index"] == len(told) else []
            told[call["index"]]["arguments"] += call["function"]["arguments"]
        begins = [found.start() for found in re.finditer('{"text"', text)]
        want = [text[begin:end][: len(whole)] for begin, whole in zip(begins, arguments, strict=False)]
        assert [call["arguments"] for call in told] == [part for part in want if part]
    assert "".join(s.content for s in said) == content
    assert [call["name"] for call in told] == ["sail"] * len(arguments)


@pytest.mark.parametrize(
    ("parser", "template", "text", "content"),
    [
        ("json_tools", tiny.CHAT_TOOLS, CALL, ""),
        ("mistral", "[TOOL_CALLS]", f"Ay. [TOOL_CALLS]sail[ARGS]{ARGUMENTS}", "Ay."),
        ("qwen3_coder", "<tool_call>\n<function=",
         "<tool_call>\n<function=sail>\n<parameter=place>\nüber\n</parameter>\n</function>\n</tool_call>", ""),
        ("pythonic", "<|tool_list_start|>", '<|tool_call_start|>[sail(place="über")]<|tool_call_end|>', ""),
    ],
)  # fmt: skip
def test_mlx_lms_parsers(tmp_path: Path, parser: str, template: str, text: str, content: str) -> None:
    """Chosen from the template as mlx-lm chooses, and fed letter by letter."""
    source = "{% if tools %}" + template + "{% endif %}" if parser != "json_tools" else template
    form = tool_format(load_tokenizer(tiny.byte_level(tmp_path, settings={"chat_template": source})))
    assert form.name == parser
    reader = CallReader(form, TOOLS)
    said = [reader.feed(letter) for letter in text] + [reader.feed("", last=True)]
    (call,) = [call for s in said for call in s.calls]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("sail", {"place": "über"})
    assert "".join(s.content for s in said) == content


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"tools": None, "tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"tool_choice": "sometimes"}, "tool_choice", "invalid_value"),
        ({"tool_choice": {"type": "function", "function": {"name": "sink"}}}, "tool_choice", "invalid_value"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type", "invalid_value"),
        ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools[0].function.name", "invalid_value"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools", "invalid_value"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"not": {}}}}]},
         "tools", "invalid_value"),
        ({"tool_choice": "required", "tools": [{"type": "function", "function": {"name": "f", "parameters": {
            "properties": {"a": {"anyOf": [{"const": i} for i in range(201)]}}}}}]}, "tools", "invalid_value"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs", "invalid_value"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "missing_required_parameter"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [
            {"id": "1", "function": {"name": "f", "arguments": "{}"}}]}]}, "messages[0].tool_calls", "unsupported_parameter"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{"}}]}]},
         "messages[0].tool_calls[0].function.arguments", "invalid_value"),
        ({"functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
    ],
)  # fmt: skip
def test_what_is_refused(server: Running, changes: dict[str, Any], param: str, code: str) -> None:
    response = httpx.post(server.url + CHAT, json=asked(**{"max_tokens": 1, **changes}))
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, code), error


def test_models_without_tools_and_formats_without_grammar(tmp_path: Any) -> None:
    with serving(*model(tmp_path)) as server:
        response = httpx.post(server.url + CHAT, json=asked())
        assert response.status_code == 400 and response.json()["error"]["param"] == "tools"
        told = {"role": "tool", "content": "x", "tool_call_id": "1"}
        error = httpx.post(server.url + CHAT, json=asked(tools=[], messages=[told])).json()["error"]
        assert error["param"] == "messages[0].role" and "no place for tools" in error["message"]
    mistral = tiny.CHAT_TOOLS.replace("<tool_call>", "[TOOL_CALLS]").replace("</tool_call>", "")
    strict = [TOOLS[1], STRICT[0]]  # what some libraries make of every function
    for template, changes, param in (
        (mistral, {"tool_choice": "required"}, "tool_choice"), (mistral, {"tools": strict}, "tools[1].function.strict"),
        (mistral, {"parallel_tool_calls": False}, "parallel_tool_calls"),
        (tiny.CHAT_TOOLS.replace("tool_call.name", "x"), {}, "tools"),
    ):  # fmt: skip
        tokenizer = load_tokenizer(tiny.byte_level(tmp_path / str(len(template)), settings={"chat_template": template}))
        with serving(model(tmp_path, max_position_embeddings=1024)[0], tokenizer) as server:
            error = httpx.post(server.url + CHAT, json=asked(**changes)).json()["error"]
            assert error["param"] == param and param in error["message"]
