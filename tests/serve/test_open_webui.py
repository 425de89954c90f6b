"""What Open WebUI sends to an OpenAI connection, replayed: its requests' paths, headers and fields, written down from its 0.12
(routers/openai.py, routers/tasks.py, utils/payload.py, utils/middleware.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx

from bitnet_mlx.models.decoder_cpu import CpuDecoder
from bitnet_mlx.serve.app import Options
from tests.serve.running import model, serving
from tests.support import tiny_tokenizers as tiny

HEADERS = {"Content-Type": "application/json", "Authorization": "Bearer secret"}
ENDS = ("length", "stop")
# The sliders of its chat controls, under the names that it sends.
SLIDERS = {
    "temperature": 0.8, "top_p": 0.9, "min_p": 0.05, "max_tokens": 20, "frequency_penalty": 0.2, "presence_penalty": 0.1,
    "seed": 42, "stop": ["</never>"], "logit_bias": {"5": -100},
}  # fmt: skip


def streamed(client: httpx.Client, body: dict[str, Any]) -> list[dict[str, Any]]:
    with client.stream("POST", "/chat/completions", content=json.dumps(body)) as response:
        assert response.status_code == 200 and "text/event-stream" in response.headers["content-type"]
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines) and lines.pop() == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines]


def test_a_chat_its_title_and_its_continuation(tmp_path: Path) -> None:
    decoder, tokenizer = model(tmp_path, max_position_embeddings=1024)
    with (
        serving(decoder, tokenizer, Options(api_key="secret")) as server,
        httpx.Client(base_url=f"{server.url}/v1", headers=HEADERS, timeout=60) as client,
    ):
        assert httpx.get(f"{server.url}/v1/models").status_code == 401, "Verify Connection says so"
        (listed,) = client.get("/models").json()["data"]
        assert listed["id"] == "test/model" and listed["object"] == "model"

        messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
        asked = {"stream": True, "model": listed["id"], "messages": messages}
        chunks = streamed(client, {**asked, "stream_options": {"include_usage": True}, **SLIDERS})
        text = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])
        usage = chunks[-1]["usage"]
        assert text and usage["completion_tokens"] == 20
        assert usage["total_tokens"] == usage["prompt_tokens"] + 20

        title = {"model": listed["id"], "stream": False, "max_tokens": 100}
        task = {"role": "user", "content": f"### Task:\nGenerate a concise title.\nUSER: hello\nASSISTANT: {text}"}
        done = client.post("/chat/completions", content=json.dumps({**title, "messages": [task]})).json()
        assert done["choices"][0]["message"]["content"] and done["choices"][0]["finish_reason"] in ENDS

        # Its Continue button: the last message is the answer so far.
        going_on = {**asked, "messages": [*messages, {"role": "assistant", "content": text}], "max_tokens": 5}
        assert streamed(client, going_on)[-1]["choices"][0]["finish_reason"] in ENDS
        # A picture comes as a list of parts: text alone is read from one.
        parts = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
        assert streamed(client, {**asked, "messages": parts, "max_tokens": 3})
        # What it shows to the person is the error's message.
        refused = client.post("/chat/completions", content=json.dumps({**asked, "reasoning_effort": "high"}))
        assert refused.status_code == 400 and "reasoning_effort" in refused.json()["error"]["message"]


def test_tools_called_natively(tmp_path: Path) -> None:
    """It collects a streamed call in the first part of it that comes, and sends that back as it stands, index and all."""
    decoder, tokenizer = model(tmp_path, tiny.CHAT_TOOLS, max_position_embeddings=1024)
    tool = {"type": "function", "function": {"name": "get_time", "description": "the time", "strict": True, "parameters": {
        "type": "object", "properties": {}, "required": []}}}  # fmt: skip
    blanks = {str(i): -50 for i in (201, 202, 205, 224)}  # they cost time
    with (
        serving(CpuDecoder(decoder.weights), tokenizer) as server,
        httpx.Client(base_url=f"{server.url}/v1", headers=HEADERS, timeout=60) as client,
    ):
        messages: list[Any] = [{"role": "user", "content": "what time is it?"}]
        asked = {"stream": True, "model": "test/model", "tools": [tool], "logit_bias": blanks, "max_tokens": 60}
        collected: list[dict[str, Any]] = []
        for chunk in streamed(
            client, {**asked, "messages": messages, "tool_choice": "required", "parallel_tool_calls": False}
        ):
            for part in chunk["choices"][0]["delta"].get("tool_calls") or []:
                known = next((call for call in collected if call["index"] == part["index"]), None)
                if known is None:
                    collected.append(part)
                else:
                    known["function"]["arguments"] += part["function"]["arguments"]
        assert [call["index"] for call in collected] == [0] and json.loads(collected[0]["function"]["arguments"]) == {}
        for arguments in (collected[0]["function"]["arguments"], ""):
            collected[0]["function"]["arguments"] = arguments
            messages[1:] = [{"role": "assistant", "content": "", "tool_calls": collected},
                            {"role": "tool", "tool_call_id": collected[0]["id"], "content": "noon"}]  # fmt: skip
            (usage,) = [c["usage"] for c in streamed(client, {**asked, "messages": messages, "max_tokens": 2,
                        "stream_options": {"include_usage": True}}) if c.get("usage")]  # fmt: skip
            function = {"name": "get_time", "arguments": {}}
            history = [
                messages[0],
                {"role": "assistant", "content": "", "tool_calls": [{"function": function}]},
                messages[2],
            ]
            ids = tokenizer.apply_chat_template(history, tools=[tool])
            assert usage["prompt_tokens"] == len(ids)
