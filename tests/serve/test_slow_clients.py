"""Clients that send or read slowly, or hold connections open: they are ended, and others are answered meanwhile."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from bitnet_mlx.serve.connection import Connection
from tests.serve.running import Running, model, serving

GOOD: dict[str, Any] = {"model": "test/model", "prompt": "hello", "max_tokens": 1}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    with serving(*model(tmp_path), head_seconds=1.0) as running:
        yield running


def connect(server: Running) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def until_closed(connection: socket.socket) -> bytes:
    answer = b""
    while part := connection.recv(65536):
        answer += part
    return answer


def test_slow_headers(server: Running) -> None:
    """Nothing at all, half a head, and a head byte by byte, twenty clients of each at once."""
    whole = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 10_000
    stop = threading.Event()

    def drip(connection: socket.socket) -> None:
        for byte in whole:
            try:
                connection.send(bytes([byte]))
            except OSError:
                return
            if stop.wait(0.02):
                return

    with ExitStack() as stack:
        held = [stack.enter_context(connect(server)) for _ in range(60)]
        for connection in held[20:40]:
            connection.sendall(whole[:40])
        threads = [threading.Thread(target=drip, args=(connection,)) for connection in held[40:]]
        for thread in threads:
            thread.start()
        assert httpx.post(f"{server.url}/v1/completions", json=GOOD, timeout=30).status_code == 200
        answers = []
        for connection in held:
            try:
                answers.append(until_closed(connection))
            except ConnectionResetError:  # it was still sending
                answers.append(b"")
        stop.set()
        for thread in threads:
            thread.join()
    for answer in answers[:40]:
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "timeout"


def test_a_second_request_on_a_connection_is_watched_too(server: Running) -> None:
    with connect(server) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = b""
        while not answer.endswith(b"}"):
            answer += connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: local")
        assert until_closed(connection).startswith(b"HTTP/1.1 408 ")


def test_a_slow_request_may_compute_for_longer_than_its_head_may_take(tmp_path: Path) -> None:
    decoder, tokenizer = model(tmp_path)
    decoder.gate = threading.Semaphore(0)
    with serving(decoder, tokenizer, head_seconds=0.2) as server:
        threading.Timer(0.5, decoder.gate.release, (100,)).start()
        assert httpx.post(f"{server.url}/v1/completions", json=GOOD, timeout=30).status_code == 200


class Wire(asyncio.Transport):
    """What a connection writes, and whether it is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.data, self.closed, self.aborted = b"", False, asyncio.Event()

    def write(self, data: Any) -> None:
        self.data += data

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.aborted.set()

    def is_closing(self) -> bool:
        return self.closed


def connections(count: int, **limits: Any) -> list[tuple[Connection, Wire]]:
    from uvicorn import Config
    from uvicorn.server import ServerState

    config = Config(lambda: None, log_config=None)
    config.load()
    state, made = ServerState(), []
    for _ in range(count):
        made.append((Connection(config=config, server_state=state, app_state={}, **limits), Wire()))
        made[-1][0].connection_made(made[-1][1])
    return made


def test_connections_have_a_bound() -> None:
    async def some() -> list[Wire]:
        return [wire for _, wire in connections(4, most=3)]

    wires = asyncio.run(some())
    assert [wire.closed for wire in wires] == [False, False, False, True]
    assert wires[3].data.startswith(b"HTTP/1.1 503 ") and b"too_many_connections" in wires[3].data


def test_one_that_does_not_read_is_cut_off() -> None:
    async def some() -> list[bool]:
        (slow, slow_wire), (other, other_wire) = connections(2, stall_seconds=0.05)
        for connection in (slow, other):
            connection.pause_writing()
        other.resume_writing()
        await asyncio.wait_for(slow_wire.aborted.wait(), 30)
        return [other_wire.aborted.is_set()]

    assert asyncio.run(some()) == [False]
