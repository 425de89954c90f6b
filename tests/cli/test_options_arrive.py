"""What a user asks for on the command line arrives where it is obeyed: no flag is read and forgotten."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

import bitnet_mlx
from bitnet_mlx.api import embedded_model
from bitnet_mlx.calibration.options import CalibrateOptions
from bitnet_mlx.cli import options
from bitnet_mlx.cli.main import build_parser, main
from bitnet_mlx.errors import ConfigError
from bitnet_mlx.generation import SamplingConfig
from bitnet_mlx.serve import server
from bitnet_mlx.serve.engine import Engine, Limits
from bitnet_mlx.serve.server import Server
from tests.support import tiny_tokenizers as tiny

MODEL = {
    "revision": "v1", "backend": "numpy", "activations": 16, "head_bits": 6, "dtype": "float32", "i2s_layout": "64",
    "ternarize": True, "threads": 3, "kv_bits": 8, "precision": "balanced", "adapter_path": "ad",
}  # fmt: skip


def flags(values: dict[str, Any]) -> list[str]:
    """As they are typed."""
    pairs = ((f"--{name.replace('_', '-')}", value) for name, value in values.items())
    return [part for flag, value in pairs for part in ([flag] if value is True else [flag, str(value)])]


@pytest.mark.parametrize(
    "command", ["generate --prompt x", "chat", "cache-prompt --prompt x --prompt-cache-file f", "serve"]
)
def test_what_is_asked_of_a_model(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(path: str, **given: Any) -> None:
        asked.append((path, given))
        raise ConfigError("enough")

    monkeypatch.setattr(bitnet_mlx, "load", load, raising=False)
    more = ["--port", "0"] if command == "serve" else []
    assert main([*command.split(), *more, "--model", "some/model", *flags(MODEL)]) == 2
    assert asked == [("some/model", MODEL)]


@pytest.mark.parametrize(
    ("line", "module"),
    [
        ("generate --prompt x --model", "checkpoint.hub"),
        ("inspect", "checkpoint.hub"),
        ("memory", "checkpoint.hub"),
        ("evaluate --data x.txt --model", "checkpoint.hub"),
        ("convert --mlx-path x --hf-path", "checkpoint.convert"),
        ("calibrate --data x.txt --model", "quality.observed"),
        ("fuse --model", "train.fuse"),
    ],
)
def test_a_revision_is_what_is_fetched(line: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def resolve(*given: Any, **_: Any) -> None:
        asked.append(given)
        raise ConfigError("enough")

    monkeypatch.setattr(f"bitnet_mlx.{module}.resolve", resolve)
    assert main([*line.split(), "some/model", "--revision", "v1"]) == 2
    assert asked == [("some/model", "v1")]


@pytest.mark.parametrize(("mode", "adapter"), [("--train", None), ("--test", Path("ad"))])
def test_what_lora_asks_of_its_base(mode: str, adapter: Path | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter is trained from the base alone, and tested on the base with it."""
    asked: list[Any] = []

    def load(path: str, **given: Any) -> None:
        asked.append((path, given))
        raise ConfigError("enough")

    monkeypatch.setattr(bitnet_mlx, "load", load, raising=False)
    line = ["lora", mode, "--model", "some/model", "--data", "d", "--adapter-path", "ad"]
    assert main([*line, "--backend", "mlx", "--dtype", "bfloat16"]) == 2
    assert asked == [("some/model", {"backend": "mlx", "dtype": "bfloat16", "adapter_path": adapter})]


def test_what_is_asked_of_a_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def calibrate(wanted: CalibrateOptions, _: Any) -> None:
        asked.append(wanted)
        raise ConfigError("enough")

    monkeypatch.setattr("bitnet_mlx.calibration.calibrate.calibrate", calibrate)
    own = {"samples": 3, "length": 40, "percentile": 98.5, "ranges_only": True, "output": Path("found.json")}
    model = {name: value for name, value in MODEL.items() if name not in ("precision", "kv_bits", "adapter_path")}
    assert main(["calibrate", "--data", "a.txt", "b.txt", "--model", "some/model", *flags({**own, **model})]) == 2
    [found] = asked
    assert found.data == (Path("a.txt"), Path("b.txt")) and found.model == "some/model"
    assert {name: getattr(found, name) for name in own} == own and model.items() <= found.load.items()


def test_how_fuse_reads_its_base(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def open_weights(path: Path, **given: Any) -> None:
        asked.append((path, given))
        raise ConfigError("enough")

    monkeypatch.setattr("bitnet_mlx.train.fuse.open_weights", open_weights)
    assert main(["fuse", "--ternarize", "--i2s-layout", "64"]) == 2
    assert asked == [(embedded_model(), {"i2s_layout": "64", "ternarize": True})]


def test_what_is_asked_of_a_draft_model(given: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """It runs on the model's own engine, with the same precision."""
    given()
    line = ["generate", "--prompt", "x", "--max-tokens", "2", "--draft-model", "small/model", *flags(MODEL)]
    assert main([*line, "--num-draft-tokens", "1", "--backend", "auto"]) == 0
    kept = {name: MODEL[name] for name in ("threads", "dtype", "kv_bits", "precision")}
    assert given.asked[1] == ("small/model", {"backend": "numpy", **kept})
    capsys.readouterr()


def test_every_sampling_flag(given: Any) -> None:
    _, tokenizer = given(generation={"do_sample": True, "temperature": 5.0, "top_k": 9})
    wanted = SamplingConfig(0.7, 0.8, 5, 0.1, 1.2, 9, seed=4)
    names = ("temp", "top_p", "top_k", "min_p", "repetition_penalty", "repetition_context_size", "seed")
    line = flags({name: getattr(wanted, name) for name in names})
    args = build_parser("generate").parse_args(["--prompt", "x", *line])
    assert options.sampling_config(args, tokenizer) == wanted


def test_a_chat_obeys_its_flags(given: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def chat(*line: str) -> dict[str, Any]:
        decoder, tokenizer = given(stdin=b"hello\n", template=tiny.CHAT)
        assert main(["chat", "--max-tokens", "12", "--json", *line]) == 0
        [turn] = json.loads(capsys.readouterr().out)["turns"]
        return {**turn, "fed": decoder.fed[0], "tokenizer": tokenizer}

    plain = chat()
    text = plain["text"]
    assert chat("--stop", text[4:7])["text"] == text[: text.find(text[4:7])]
    sampled = [chat("--temp", "2", "--seed", seed)["text"] for seed in ("1", "1", "2")]
    assert sampled[0] == sampled[1] != text and sampled[2] not in (text, sampled[0])
    room = plain["prompt_tokens"] + 3
    assert chat("--max-kv-size", str(room))["generation_tokens"] == 4
    guessed = chat("--prompt-lookup", "--num-draft-tokens", "2")
    assert guessed["text"] == text and guessed["speculation"]["drafter"] == "prompt look-up"
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    told = chat("--system-prompt", "be brief")
    assert told["fed"] == told["tokenizer"].apply_chat_template(messages)


def test_an_address_of_ipv6_is_a_url(
    given: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given(template=tiny.CHAT)
    monkeypatch.setattr(Server, "serve_until_told", lambda self: None)
    monkeypatch.setattr(server, "listen", lambda host, port: socket.create_server(("127.0.0.1", port)))
    assert main(["serve", "--port", "0", "--json", "--host", "::1"]) == 0
    assert re.fullmatch(r"http://\[::1\]:\d+", json.loads(capsys.readouterr().out)["url"])


def test_a_server_obeys_its_flags(
    given: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: dict[str, Any] = {}
    start = Engine.start
    monkeypatch.setattr(Server, "serve_until_told", lambda self: ran.update(vars(self.config)))
    monkeypatch.setattr(Engine, "start", lambda self: (ran.setdefault("limits", self.limits), start(self)))
    given(template=tiny.CHAT + "{# </think> #}")
    asked = {
        "model": "own/model", "max_tokens": 3, "max_kv_size": 300, "max_batch": 2, "max_queue": 5, "max_kv_bytes": "40K",
        "prompt_cache_bytes": "20KB", "request_timeout": 9, "drain": 4, "cors": "http://page.example", "allow_host": "Box.Local",
        "api_key": "secret", "pooling": "last", "allow_model": embedded_model(), "prompt_lookup": True, "num_draft_tokens": 2,
        "reasoning_format": "none",
    }  # fmt: skip
    same = {name: MODEL[name] for name in ("head_bits", "dtype", "kv_bits", "precision", "threads")}
    assert main(["serve", "--port", "0", "--json", *flags({**asked, **same})]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["context"] == 300 and record["model"] == "own/model"
    assert ran["timeout_graceful_shutdown"] == 4
    key = {"Authorization": "Bearer secret", "Origin": "http://page.example"}
    with TestClient(ran["app"], base_url="http://box.local:8080", headers=key) as client:
        found = client.get("/v1/models")
        assert [m["id"] for m in found.json()["data"]] == ["own/model", "tiny"]
        assert found.headers["access-control-allow-origin"] == "http://page.example"
        for wrong in ("Basic secret", "Bearer other", "secret"):
            assert client.get("/v1/models", headers={"Authorization": wrong}).status_code == 401, wrong
        assert client.get("/metrics", headers={"Authorization": ""}).status_code == 401
        assert client.get("/health", headers={"Authorization": ""}).json()["status"] == "ok"
        assert client.get("/v1/models", headers={"Host": "other.local"}).status_code == 421
        message = {"model": "own/model", "messages": [{"role": "user", "content": "a b a b a b"}]}
        usage = client.post("/v1/chat/completions", json=message).json()["usage"]
        assert usage["completion_tokens"] == 3 and "completion_tokens_details" not in usage, (
            "thoughts are not told apart"
        )
        said = [
            client.post(
                "/v1/chat/completions",
                json={**message, "messages": [{"role": role, "content": "x"}, *message["messages"]]},
            )
            for role in ("system", "developer")
        ]
        assert said[0].json()["choices"] == said[1].json()["choices"], "OpenAI's newer name of the same role"
        text = {"model": "own/model", "prompt": "hello"}
        told = client.post(
            "/v1/completions", json={**text, "stream": True, "stream_options": {"include_usage": True}}
        ).text
        *chunks, counts = [json.loads(line[6:]) for line in told.splitlines() if line.startswith("data: {")]
        assert chunks and all(chunk["usage"] is None for chunk in chunks), "as OpenAI has it where counts are asked for"
        assert counts["choices"] == [] and counts["usage"]["completion_tokens"] == 16
        assert client.post("/v1/completions", json=text).json()["usage"]["completion_tokens"] == 16
        assert client.post("/v1/embeddings", json={"model": "own/model", "input": "hello"}).status_code == 200
        assert client.post("/v1/completions", json={**text, "model": "tiny"}).status_code == 200
        assert client.get("/v1/models/tiny").json()["context_length"] == 300
    assert ran["limits"] == Limits(running=2, waiting=5, kv_bytes=40_000, prefix_bytes=20_000, seconds=9.0)
    assert given.asked[1] == (embedded_model(), {"backend": "numpy", **same})
