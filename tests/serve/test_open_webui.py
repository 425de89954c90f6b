"""What Open WebUI sends to an OpenAI connection, replayed: its requests' paths, headers and fields, written down from its 0.12
(routers/openai.py, routers/tasks.py, utils/payload.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx

from bitnet_mlx.serve.app import Options
from tests.serve.running import model, serving

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
