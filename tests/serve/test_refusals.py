"""What is refused, with which status, and that the server answers the next one."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from bitnet_mlx.serve.app import Options
from bitnet_mlx.serve.failures import ApiError
from bitnet_mlx.serve.server import host_names, listen
from tests.serve.running import Running, model, serving

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
GOOD: dict[str, Any] = {"model": "test/model", "prompt": "hello", "max_tokens": 1}
TALK: dict[str, Any] = {"model": "test/model", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    options = Options(max_body=20_000, body_seconds=0.5)
    with serving(*model(tmp_path_factory.mktemp("model")), options) as running:
        yield running


@pytest.fixture(autouse=True)
def the_next_one_is_answered(server: Running) -> Iterator[None]:
    yield
    assert httpx.post(server.url + COMPLETIONS, json=GOOD).status_code == 200


def refused(response: httpx.Response) -> tuple[int, str | None, str | None]:
    """(status, param, code), from an error in OpenAI's shape."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert response.headers["content-type"] == "application/json"
    return response.status_code, error["param"], error["code"]


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("temperature", 2.1, None), ("temperature", -0.1, None), ("temperature", "1", None), ("temperature", True, None),
        ("top_p", 0, None), ("top_p", 1.1, None), ("top_k", -1, None), ("top_k", 1.5, None), ("min_p", 2, None),
        ("repetition_penalty", 0, None), ("presence_penalty", 2.1, None), ("frequency_penalty", -3, None),
        ("max_tokens", 10**30, None), ("max_tokens", "5", None), ("max_tokens", 1.0, None),
        ("n", 0, None), ("n", 17, None), ("seed", 2**63, None), ("seed", 1.5, None), ("stop", "", None), ("stop", 3, None),
        ("stop", ["a"] * 17, None), ("stop", ["a", 1], None), ("stream", "yes", None), ("stream", 1, None),
        ("logit_bias", {"5000": 1}, None), ("logit_bias", {"x": 1}, None), ("logit_bias", {"-1": 1}, None),
        ("logit_bias", {"1": 101}, "logit_bias.1"), ("logit_bias", [1], None), ("logit_bias", {"1": "x"}, "logit_bias.1"),
        ("stream_options", {"include_usage": True}, None), ("stream_options", {"x": 1}, "stream_options.x"),
        ("model", 3, None), ("user", 5, None),
    ],
)  # fmt: skip
def test_values_outside_what_is_allowed(server: Running, field: str, value: Any, param: str | None) -> None:
    for path, body in ((CHAT, TALK), (COMPLETIONS, GOOD)):
        status, named, _ = refused(httpx.post(server.url + path, json={**body, field: value}))
        assert (status, named) == (400, param or field)


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "missing_required_parameter"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "invalid_value"),
        (
            {
                "messages": [
                    {"role": "user", "content": "x", "name": "y"},
                    {"role": "user", "content": "x", "name": "z"},
                ]
            },
            "messages[0].name",
            "unsupported_parameter",
        ),
        ({"messages": [{"role": "user", "content": "hello " * 300}]}, "messages", "context_length_exceeded"),
        ({"messages": "hello"}, "messages", "invalid_value"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"max_completion_tokens": 2}, "max_tokens", "invalid_value"),
    ],
)
def test_conversations(server: Running, changes: dict[str, Any], param: str, code: str) -> None:
    assert refused(httpx.post(server.url + CHAT, json={**TALK, **changes})) == (400, param, code)


@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        ([], "invalid_value"), ([[]], "invalid_value"), (7, "invalid_value"), ([1, "x"], "invalid_value"),
        ([5000], "invalid_value"),
        ([-1], "invalid_value"), ([10**40], "invalid_value"), (["x", None], "invalid_value"), ([True], "invalid_value"),
        ("hello " * 300, "context_length_exceeded"), ([1] * 257, "context_length_exceeded"), (None, "missing_required_parameter"),
    ],
)  # fmt: skip
def test_prompts(server: Running, prompt: Any, code: str) -> None:
    assert refused(httpx.post(server.url + COMPLETIONS, json={**GOOD, "prompt": prompt})) == (400, "prompt", code)


@pytest.mark.parametrize(("path", "body"), [(CHAT, TALK), (COMPLETIONS, GOOD)])
@pytest.mark.parametrize("named", [{}, {"model": None}])
def test_a_request_without_a_model_gets_the_servers(
    server: Running, path: str, body: dict[str, Any], named: dict[str, Any]
) -> None:
    """As mlx-lm's and llama.cpp's servers do."""
    rest = {key: value for key, value in body.items() if key != "model"}
    answer = httpx.post(server.url + path, json={**rest, **named})
    assert answer.status_code == 200 and answer.json()["model"] == "test/model"


def test_a_prompt_that_fills_the_context_gives_one_token(server: Running) -> None:
    choice = httpx.post(server.url + COMPLETIONS, json={**GOOD, "prompt": [1] * 256, "max_tokens": 50}).json()[
        "choices"
    ][0]
    assert choice["finish_reason"] == "length"


def test_more_texts_than_may_wait(server: Running) -> None:
    assert refused(httpx.post(server.url + COMPLETIONS, json={**GOOD, "prompt": ["x"] * 65}))[:2] == (400, "n")


def test_unknown_models_and_routes(server: Running) -> None:
    other = httpx.post(server.url + COMPLETIONS, json={**GOOD, "model": "microsoft/bitnet-b1.58-2B-4T"})
    assert refused(other) == (404, "model", "model_not_found")
    assert refused(httpx.get(server.url + "/v1/nothing"))[0] == 404
    assert refused(httpx.get(server.url + COMPLETIONS))[0] == 405
    body = {"model": "test/model", "input": "x"}
    assert refused(httpx.post(server.url + "/v1/embeddings", json=body)) == (400, "model", "no_embeddings")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"model": NaN}',
        b"\xff\xfe",
        b'{"a": "\\ud800"}',
        b"[" * 10_000,
        b'{"a": ' * 3000,
        b"1e999",
    ],
)
def test_malformed_json(server: Running, body: bytes) -> None:
    response = httpx.post(server.url + COMPLETIONS, content=body, headers={"Content-Type": "application/json"})
    assert refused(response) == (400, None, "invalid_json")


def test_the_body_must_be_json_by_its_header(server: Running) -> None:
    """Else a foreign web page could send it without asking first."""
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        response = httpx.post(server.url + COMPLETIONS, content=json.dumps(GOOD), headers={"Content-Type": kind})
        assert refused(response)[0] == 415
    assert (
        "access-control-allow-origin"
        not in httpx.get(server.url + "/v1/models", headers={"Origin": "http://x"}).headers
    )


def test_bodies_too_long(server: Running) -> None:
    body = {**GOOD, "prompt": "x" * 30_000}
    assert refused(httpx.post(server.url + COMPLETIONS, json=body)) == (413, None, "body_too_large")
    parts = (b"x" * 5000 for _ in range(6))  # of no stated length
    headers = {"Content-Type": "application/json"}
    assert refused(httpx.post(server.url + COMPLETIONS, content=parts, headers=headers)) == (
        413,
        None,
        "body_too_large",
    )


def raw(server: Running, data: bytes) -> bytes:
    """What a connection answers."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(data)
        answer = b""
        while part := connection.recv(65536):
            answer += part
            if b"\r\n\r\n" in answer and answer.endswith(b"}"):
                break
        return answer


def test_slow_bodies_and_long_headers(server: Running) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n"
    assert raw(server, head + b'\r\n{"model":').startswith(b"HTTP/1.1 408")
    for data, status, code in (
        (head + b"X: " + b"y" * 100_000, 431, "headers_too_large"),
        (b"\x16\x03\x01 not http\r\n\r\n", 400, "invalid_http"),
        (head.replace(b"100", b"1" * 5000) + b"\r\n", 400, "invalid_http"),
    ):
        answer = raw(server, data)
        assert answer.startswith(f"HTTP/1.1 {status} ".encode()), answer
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == code


def test_names_of_the_server(tmp_path: Path) -> None:
    """A foreign name that points to 127.0.0.1 is a web page's way around the browser's rules."""
    with listen("127.0.0.1", 0) as here, listen("0.0.0.0", 0) as everywhere:
        names = host_names(here, ["My.Proxy"])
        assert host_names(everywhere, []) == ()
    with serving(*model(tmp_path), Options(hosts=names)) as server:
        port = server.url.rpartition(":")[2]
        for host in ("127.0.0.1", f"127.0.0.1:{port}", "localhost:1", "LOCALHOST", "[::1]:8080", "[::1]", "my.proxy"):
            assert httpx.get(server.url + "/v1/models", headers={"Host": host}).status_code == 200, host
        for host in ("evil.example", "evil.example:8080", "127.0.0.1.evil.example", "localhost:evil", ""):
            for path in ("/", "/health", "/v1/models"):
                answer = httpx.get(server.url + path, headers={"Host": host})
                assert refused(answer) == (421, None, "unknown_host"), host


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "invalid_request_error"), (401, "authentication_error"), (404, "invalid_request_error"), (429, "rate_limit_error"),
     (500, "server_error"), (503, "server_error")],
)  # fmt: skip
def test_the_kind_of_an_error_is_openais(status: int, kind: str) -> None:
    error = ApiError(status, "said", param="n", code="c").body()["error"]
    assert error == {"message": "said", "type": kind, "param": "n", "code": "c"}
