"""Models that think before they answer: the same told apart whole and streamed, switched off, cut short, with tools and schemas."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from bitnet_mlx.tokenizer import load_tokenizer
from tests.serve.running import Running, serving
from tests.support import tiny_tokenizers as tiny
from tests.support.scripted_model import ScriptedDecoder

ASKED: list[Any] = [{"role": "user", "content": "what is <think>"}]
# As Qwen's: thoughts are told again behind the last question, thinking can be switched off; `open` begins them in the prompt.
TEMPLATE = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index %}{% endif %}"
    "{% endfor %}"
    + tiny.CHAT_TOOLS.replace(
        "{{ m['content'] | trim }}",
        "{% if m.reasoning_content and loop.index > ns.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
        "{{ m['content'] | trim }}",
    ).replace(
        "<|start|>assistant\n{% endif %}",
        "<|start|>assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n"
        "{% elif open %}<think>\n{% endif %}{% endif %}",
    )
)
THOUGHT, SAID = "The sea?\n\nNo < yes.", "Aye, aye.\n\nSir </think>!"
WRITTEN = f"<think>\n{THOUGHT}\n</think>\n\n{SAID}"
PLACE = {
    "type": "object",
    "properties": {"place": {"enum": ["sea", "port"]}},
    "required": ["place"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [{"type": "function", "function": {"name": "sail", "parameters": PLACE}}]
CALL = '<tool_call>\n{"name": "sail", "arguments": {"place": "sea"}}\n</tool_call>'
SCHEMA: Any = {"type": "json_schema", "json_schema": {"name": "p", "schema": PLACE}}


def added(*special: bool) -> dict[str, Any]:
    """The marks as tokens of the vocabulary."""
    marks = zip(("<think>", "</think>"), special, strict=True)
    return {str(421 + i): {"content": mark, "special": one} for i, (mark, one) in enumerate(marks)}


@pytest.fixture(
    scope="module", params=[{}, added(False, False), added(True, True)], ids=["letters", "tokens", "special"]
)
def server(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Running]:
    settings = {"chat_template": TEMPLATE, "added_tokens_decoder": request.param}
    tokenizer = load_tokenizer(tiny.byte_level(tmp_path_factory.mktemp("model"), settings=settings))
    decoder: Any = ScriptedDecoder(tokenizer, max_position_embeddings=1024)
    with serving(decoder, tokenizer, prefix_bytes=0) as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


def ask(client: openai.OpenAI, **changes: Any) -> dict[str, Any]:
    """What came of a request: the same whole and streamed. `extra`: what the client does not know."""
    base = {
        "model": "test/model",
        "messages": ASKED,
        "max_tokens": 150,
        "extra_body": changes.pop("extra", {}),
        **changes,
    }
    reply = client.chat.completions.create(**base)
    whole = told(reply.choices[0].message.model_dump(), reply.choices[0].finish_reason, reply.usage)
    summed: dict[str, Any] = {"reasoning_content": "", "content": "", "calls": {}}
    finish = usage = None
    for chunk in client.chat.completions.create(**base, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            delta = choice.delta.model_dump()
            for name in ("reasoning_content", "content"):
                summed[name] += delta.get(name) or ""
            assert not (delta.get("reasoning_content") and (summed["content"] or delta["content"])), (
                "thoughts come first"
            )
            for call in delta.get("tool_calls") or []:
                kept = summed["calls"].setdefault(call["index"], {"function": {"name": "", "arguments": ""}})
                for name in ("name", "arguments"):
                    kept["function"][name] += call["function"].get(name) or ""
            finish = choice.finish_reason or finish
    summed["tool_calls"] = list(summed["calls"].values())
    assert told(summed, finish, usage) == whole
    return whole


def told(message: dict[str, Any], finish: str | None, usage: Any) -> dict[str, Any]:
    assert usage.completion_tokens_details is not None
    return {
        "thought": message.get("reasoning_content") or "", "said": message["content"] or "", "finish": finish,
        "calls": [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in message["tool_calls"] or []],
        "tokens": usage.completion_tokens_details.reasoning_tokens, "all": usage.completion_tokens,
    }  # fmt: skip


def count(server: Running, text: str) -> int:
    return len(server.tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("opened", [False, True])
def test_thoughts_are_told_apart(server: Running, client: openai.OpenAI, opened: bool) -> None:
    """Whether the model begins them or the prompt. Later marks are text."""
    server.decoder.text = WRITTEN.removeprefix("<think>\n" if opened else "")
    got = ask(client, extra={"chat_template_kwargs": {"open": opened}})
    assert (got["thought"], got["said"], got["finish"], got["calls"]) == (THOUGHT, SAID, "stop", [])
    assert got["tokens"] == count(server, server.decoder.text.partition("</think>")[0] + "</think>")
    assert got["all"] == count(server, server.decoder.text) + 1


def test_none_leaves_them_where_they_are(server: Running, client: openai.OpenAI) -> None:
    server.decoder.text = WRITTEN
    got = client.chat.completions.create(model="test/model", messages=ASKED, extra_body={"reasoning_format": "none"})
    marked = not server.tokenizer.special_ids & {421}
    assert got.choices[0].message.content == (
        WRITTEN if marked else WRITTEN.replace("<think>", "").replace("</think>", "")
    )
    assert "reasoning_content" not in got.choices[0].message.model_dump()
    assert got.usage and got.usage.completion_tokens_details is None
    text = client.completions.create(model="test/model", prompt="a b", max_tokens=150).choices[0].text
    assert text == got.choices[0].message.content


def test_switched_off_or_not_needed(server: Running, client: openai.OpenAI) -> None:
    server.decoder.text = "\n No thoughts, <think> is text."
    for kwargs in ({"enable_thinking": False}, {}):
        got = ask(client, extra={"chat_template_kwargs": kwargs})
        assert (got["thought"], got["said"], got["finish"], got["tokens"]) == ("", server.decoder.text, "stop", 0)


def test_cut_short(server: Running, client: openai.OpenAI) -> None:
    """By its length and by stop strings, which are met in thoughts too, as in llama.cpp and mlx-lm."""
    server.decoder.text = WRITTEN
    size = count(server, f"<think>\n{THOUGHT}")
    got = ask(client, max_tokens=size)
    assert (got["thought"], got["said"], got["finish"], got["tokens"]) == (THOUGHT, "", "length", size)
    got = ask(client, stop="No <")
    assert (got["thought"], got["said"], got["finish"]) == ("The sea?", "", "stop")
    got = ask(client, stop=["</think>"])
    assert (got["thought"], got["said"], got["finish"]) == (THOUGHT, "", "stop")
    server.decoder.text = "<think>No?</think>Aye, Sir"
    got = ask(
        client, stop=["No?</think>No"]
    )  # held back so long that one token brings the end of one and the other's beginning
    assert (got["thought"], got["said"], got["finish"]) == ("No?", "Aye, Sir", "stop")
    server.decoder.text = WRITTEN
    got = ask(client, stop=["Sir"])
    assert (got["thought"], got["said"], got["finish"]) == (THOUGHT, "Aye, aye.\n\n", "stop")


def test_log_probabilities_are_of_all_tokens(server: Running, client: openai.OpenAI) -> None:
    server.decoder.text = WRITTEN
    options: Any = {"model": "test/model", "messages": ASKED, "max_tokens": 150, "logprobs": True, "n": 2}
    for choice in client.chat.completions.create(**options).choices:
        assert choice.logprobs and choice.message.model_dump()["reasoning_content"] == THOUGHT
        assert b"".join(bytes(t.bytes or []) for t in choice.logprobs.content or []).decode() == WRITTEN
    tokens, thoughts = ["", ""], ["", ""]
    for chunk in client.chat.completions.create(**options, stream=True):
        for choice in chunk.choices:
            tokens[choice.index] += "".join(t.token for t in (choice.logprobs and choice.logprobs.content) or [])
            thoughts[choice.index] += choice.delta.model_dump().get("reasoning_content") or ""
    assert (tokens, thoughts) == ([WRITTEN] * 2, [THOUGHT] * 2)


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_calls_behind_thoughts(server: Running, client: openai.OpenAI, choice: str) -> None:
    """What looks like a call in thoughts that come to their end is none, where calls are enforced; else it ends them, as in
    mlx-lm's server. `required` and a schema hold behind the thoughts."""
    server.decoder.text = f"<think>\nI call.\n</think>\n\n{CALL}"
    options: dict[str, Any] = {"tools": TOOLS, "tool_choice": choice}
    got = ask(client, **options)
    assert (got["thought"], got["said"], got["calls"], got["finish"]) == (
        "I call.",
        "",
        [("sail", {"place": "sea"})],
        "tool_calls",
    )
    server.decoder.text = f"<think>\nI call {CALL}\n</think>\n\n{CALL}"
    got = ask(client, **options)
    if choice == "required":
        assert (got["thought"], got["calls"]) == (f"I call {CALL}", [("sail", {"place": "sea"})])
    else:
        assert got["thought"] == "I call " and got["calls"][0] == ("sail", {"place": "sea"})
    server.decoder.text = "<think>\nI do not call.\n</think>\n\nNo call."
    got = ask(client, **options)
    assert got["thought"] == "I do not call."
    assert (got["said"], got["calls"]) == ("No call.", []) if choice == "auto" else got["calls"] and not got["said"]


WANTED: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": SCHEMA}, '{"place": "port"}', '{"place": "port"}'),
    ({"response_format": SCHEMA}, 'Sure! {"place": "port"}', ""),
    ({"extra": {"structured_outputs": {"regex": "a/b[0-9]\\n/c"}}}, "a/b5\n/c", "a/b5\n/c"),
    ({"extra": {"structured_outputs": {"choice": ["aye", "nay"]}}}, "nay", "nay"),
]


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize(("wish", "written", "want"), WANTED)
def test_the_answer_alone_is_enforced(
    server: Running, client: openai.OpenAI, wish: dict[str, Any], written: str, want: str, opened: bool
) -> None:
    """Thoughts are free. Where thinking is switched off, or the model does without, the answer begins at once."""
    wish = {**wish, "extra": {**wish.get("extra", {}), "chat_template_kwargs": {"open": opened}}}
    server.decoder.text = ("" if opened else "<think>\n") + f"Which {{ place? nay\n</think>\n\n{written}"
    got = ask(client, **wish)
    assert (got["thought"], got["finish"]) == ("Which { place? nay", "stop")
    assert got["said"] == want or (not want and json.loads(got["said"])["place"] in ("sea", "port"))
    if opened:
        server.decoder.text = f"<think>never</think>{written}"
        wish["extra"] |= {"chat_template_kwargs": {"enable_thinking": False}}
    elif want:
        server.decoder.text = written
    got = ask(client, **wish)
    if opened or want:
        assert (got["thought"], got["tokens"], got["finish"]) == ("", 0, "stop") and "never" not in got["said"]
        assert opened or got["said"] == want


def test_an_answer_can_be_sent_back(server: Running, client: openai.OpenAI) -> None:
    """As the client has it; the template is given the thoughts, and tells them where it wants to."""
    server.decoder.text = f"<think>\n{THOUGHT}\n</think>\n\n{CALL}"
    message = client.chat.completions.create(model="test/model", messages=ASKED, tools=TOOLS).choices[0].message
    sent = message.model_dump(exclude_none=True)
    assert sent["reasoning_content"] == THOUGHT
    turns: list[Any] = [
        *ASKED,
        message,
        {"role": "tool", "tool_call_id": sent["tool_calls"][0]["id"], "content": "done"},
    ]
    call = {"function": {"name": "sail", "arguments": {"place": "sea"}}}
    mine = [ASKED[0], {"role": "assistant", "content": "", "reasoning_content": THOUGHT, "tool_calls": [call]},
            {"role": "tool", "content": "done"}]  # fmt: skip
    for more in ([], [{"role": "user", "content": "more"}]):
        got = client.chat.completions.create(model="test/model", messages=turns + more, tools=TOOLS, max_tokens=1)
        prompt = server.tokenizer.render_chat_template(mine + more, tools=TOOLS)
        assert (f"<think>{THOUGHT}</think>" in prompt) is not more
        assert got.usage and got.usage.prompt_tokens == len(server.tokenizer.encode(prompt))
    only: list[Any] = [*ASKED, {"role": "assistant", "content": None, "reasoning_content": "cut"}, ASKED[0]]
    client.chat.completions.create(model="test/model", messages=only, max_tokens=1)
    with pytest.raises(openai.BadRequestError, match="in messages of the role assistant alone"):
        client.chat.completions.create(
            model="test/model", messages=[{**ASKED[0], "reasoning_content": "x"}], max_tokens=1
        )  # type: ignore[list-item]


def test_the_servers_own_setting(tmp_path: Path) -> None:
    """--reasoning-format none, which a request may overrule; a model that does not think has nothing taken away."""
    for template, default in ((TEMPLATE, "none"), (tiny.CHAT, "auto")):
        tokenizer = load_tokenizer(tiny.byte_level(tmp_path / default, settings={"chat_template": template}))
        decoder: Any = ScriptedDecoder(tokenizer, WRITTEN, max_position_embeddings=1024)
        with serving(decoder, tokenizer, prefix_bytes=0, reasoning_format=default) as server, server.client() as client:
            options: Any = {"model": "test/model", "messages": ASKED}
            assert client.chat.completions.create(**options).choices[0].message.content == WRITTEN
            body = {**options, "reasoning_format": "deepseek"}
            message = httpx.post(server.url + "/v1/chat/completions", json=body, timeout=60).json()["choices"][0][
                "message"
            ]
            assert message["content"] == (SAID if template == TEMPLATE else WRITTEN)
