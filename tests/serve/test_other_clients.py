"""What programs with clients of their own send, replayed as they sent it (autogen-ext 0.7, openai-agents 0.20, outlines 1.3;
Zed by its source), with what their users must get.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from bitnet_mlx.models.decoder_cpu import CpuDecoder
from bitnet_mlx.tokenizer import load_tokenizer
from tests.serve.running import Running, WatchedDecoder, serving
from tests.support import tiny_tokenizers as tiny

# As Qwen's: thinking is switched by a variable of the template. Names are shown where `speakers` is set.
THINKING = tiny.CHAT_TOOLS.replace(
    "<|start|>{{ m['role'] }}\n", "<|start|>{{ m['role'] }}{% if speakers and m.name %} {{ m.name }}{% endif %}\n"
).replace(
    "<|start|>assistant\n{% endif %}",
    "<|start|>assistant\n{% if enable_thinking is false %}<think></think>{% endif %}{% endif %}",
)
WEATHER = {"name": "get_weather", "description": "w", "parameters": {
    "properties": {"city": {"description": "city", "title": "City", "type": "string"}},
    "required": ["city"], "title": "get_weatherargs", "type": "object", "additionalProperties": False}}  # fmt: skip
CALLED = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Paris"}'}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    tokenizer = load_tokenizer(tiny.byte_level(tmp_path_factory.mktemp("model"), settings={"chat_template": THINKING}))
    decoder = WatchedDecoder(tokenizer.vocab_size, max_position_embeddings=2048)
    with serving(CpuDecoder(decoder.weights), tokenizer, max_tokens=4) as running:
        yield running


def ask(server: Running, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/chat/completions", json={"model": "test/model", **body}, timeout=60)


def prompt_of(server: Running, response: httpx.Response, messages: list[Any], **extra: Any) -> bool:
    """Whether the prompt had as many tokens as the template makes of these messages."""
    assert response.status_code == 200, response.text
    ids = server.tokenizer.apply_chat_template(messages, **extra)
    return response.json()["usage"]["prompt_tokens"] == len(ids)


def test_autogen(server: Running) -> None:
    """Each of its messages has a name: those of one speaker a role say nothing, others the template would have to show."""
    plain = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"},
             {"role": "assistant", "content": "ho"}, {"role": "user", "content": "more"}]  # fmt: skip
    names = {"system": None, "user": "user", "assistant": "helper"}
    named = [{**m, **({"name": names[m["role"]]} if names[m["role"]] else {})} for m in plain]
    assert prompt_of(server, ask(server, messages=named, stream=False), plain)
    tools = [{"type": "function", "function": {**WEATHER, "strict": False}}]
    turn = [{"content": "weather?", "name": "user", "role": "user"},
            {"tool_calls": [CALLED], "role": "assistant", "name": "helper"},
            {"content": "22", "role": "tool", "tool_call_id": "call_1"}]  # fmt: skip
    assert ask(server, messages=turn, tools=tools).status_code == 200
    several = [*named, {"role": "user", "content": "x", "name": "critic"}]
    error = ask(server, messages=several).json()["error"]
    assert (error["param"], error["code"]) == ("messages[1].name", "unsupported_parameter")
    shown = ask(server, messages=several, chat_template_kwargs={"speakers": True})
    assert prompt_of(server, shown, several, speakers=True) and not prompt_of(server, shown, [*plain, several[-1]])


def test_openai_agents(server: Running) -> None:
    """Its settings come along whether there are tools or not."""
    messages = [{"content": "be brief", "role": "system"}, {"role": "user", "content": "hi"}]
    settings = {"parallel_tool_calls": False, "metadata": {"trace": "x"}, "store": False}
    assert prompt_of(server, ask(server, messages=messages, **settings), messages)
    tools = [{"type": "function", "function": {**WEATHER, "strict": True}}]
    assert ask(server, messages=messages, tools=tools, tool_choice="auto", **settings).status_code == 200


def test_zed(server: Running) -> None:
    """A tool that returned nothing is a list of no parts."""
    messages: list[Any] = [
        {"role": "system", "content": "be brief"}, {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": [CALLED]},
        {"role": "tool", "content": [], "tool_call_id": "call_1"},
    ]  # fmt: skip
    asked = {"stream_options": {"include_usage": True}, "temperature": 1.0, "max_completion_tokens": 4,
             "prompt_cache_key": "thread", "tools": [{"type": "function", "function": WEATHER}]}  # fmt: skip
    assert ask(server, messages=messages, stream=True, **asked).status_code == 200
    without = {k: v for k, v in asked.items() if k not in ("tools", "stream_options")}
    assert ask(server, messages=messages[:2], tool_choice="auto", **without).status_code == 200


def test_outlines(server: Running) -> None:
    """Its vLLM client. The template knows of thoughts, so a random model may think until its tokens are gone."""
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 30, "temperature": 1.5}
    for wanted, allowed in (({"regex": "(yes|no)"}, ("yes", "no")), ({"json": {"enum": [1, 2]}}, ("1", "2"))):
        choices = [ask(server, **asked, seed=i, structured_outputs=wanted).json()["choices"][0] for i in range(6)]
        ended = {choice["message"]["content"] for choice in choices if choice["finish_reason"] == "stop"}
        assert ended and ended <= set(allowed), choices
    error = ask(server, **asked, structured_outputs={"grammar": 'start: "a"'}).json()["error"]
    assert error["param"] == "structured_outputs.grammar"


def test_users_of_mlx_lm_and_llama_cpp(server: Running) -> None:
    messages = [{"role": "user", "content": "hi"}]
    switched = ask(server, messages=messages, chat_template_kwargs={"enable_thinking": False})
    assert prompt_of(server, switched, messages, enable_thinking=False) and not prompt_of(server, switched, messages)
    for name, why in (
        ("enable_thought", "is not looked at"),
        ("messages", "not a client's"),
        ("bos_token", "not a client's"),
    ):
        error = ask(server, messages=messages, chat_template_kwargs={name: False}).json()["error"]
        assert error["param"] == f"chat_template_kwargs.{name}" and why in error["message"]
    nothing = {"cache_prompt": True, "ignore_eos": False, "repeat_penalty": 1.0, "xtc_probability": 0.0, "mirostat": 0,
               "typical_p": 1, "n_probs": 0, "timings_per_token": False, "dry_multiplier": 0, "id_slot": -1}  # fmt: skip
    assert ask(server, messages=messages, **nothing).status_code == 200
    for field, value, other in (
        ("repeat_penalty", 1.1, "repetition_penalty"), ("n_predict", 5, "max_tokens"), ("grammar", "x", "structured_outputs"),
        ("json_schema", {}, "response_format"), ("guided_json", {}, "structured_outputs"),
        ("reasoning_effort", "none", "chat_template_kwargs"), ("cache_prompt", False, "leave it out"),
    ):  # fmt: skip
        error = ask(server, messages=messages, **{field: value}).json()["error"]
        assert error["param"] == field and other in error["message"]


@pytest.mark.parametrize("path", ["/v1/responses", "/chat/completions", "/completion", "/api/chat"])
def test_a_wrong_address_is_told_the_right_ones(server: Running, path: str) -> None:
    """The newest defaults of OpenAI's own libraries, and addresses of llama.cpp's, mlx-lm's and Ollama's servers."""
    response = httpx.post(server.url + path, json={"model": "test/model"})
    assert response.status_code == 404 and "/v1/chat/completions" in response.json()["error"]["message"]
