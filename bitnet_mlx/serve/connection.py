"""One connection: limits on what uvicorn leaves without one, each answered in the API's shape.

A client has HEAD_SECONDS for a request's first line and headers, from the connection's or the request's first byte on,
however it spreads them; one that does not read what is written for it is cut off after STALL_SECONDS; a connection beyond
CONNECTIONS is turned away.
"""

from __future__ import annotations

import asyncio
import json
import sys
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from bitnet_mlx.serve.failures import ApiError

HEAD_SECONDS = 10.0
STALL_SECONDS = 60.0
CONNECTIONS = 512


class Connection(H11Protocol):
    """uvicorn's, with those limits."""

    def __init__(
        self, *args: Any, head_seconds: float = HEAD_SECONDS, stall_seconds: float = STALL_SECONDS,
        most: int = CONNECTIONS, **more: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, **more)
        self._head_seconds, self._stall_seconds, self._most = head_seconds, stall_seconds, most
        self._waiting: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._most:
            text = f"This server has {self._most} connections open, as many as it takes"
            self._turn_away(ApiError(503, text, code="too_many_connections", headers={"Retry-After": "1"}))
        else:
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        self._unstall()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client reads more slowly than it is written to."""
        super().pause_writing()
        self._unstall()
        self._stalled = self.loop.call_later(self._stall_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """It has read."""
        self._unstall()
        super().resume_writing()

    def _unstall(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self._watch()
        else:
            self._unwatch()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP, or has a head that is too long."""
        error = sys.exc_info()[1]
        status = getattr(error, "error_status_hint", 400)
        told = "The headers are too long" if status == 431 else msg
        self._turn_away(ApiError(status, told, code="headers_too_large" if status == 431 else "invalid_http"))

    def _watch(self) -> None:
        if self._waiting is None:
            self._waiting = self.loop.call_later(self._head_seconds, self._too_slow)

    def _unwatch(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _too_slow(self) -> None:
        text = f"The headers were not there after {self._head_seconds:g} s"
        self._turn_away(ApiError(408, text, code="timeout"))

    def _turn_away(self, error: ApiError) -> None:
        """Answer, where no other answer is on its way, and close."""
        self._unwatch()
        if self.cycle is None or self.cycle.response_complete:
            body = json.dumps(error.body()).encode()
            head = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}", "Content-Type: application/json"]
            head += [f"{name}: {value}" for name, value in error.headers.items()]
            head += [f"Content-Length: {len(body)}", "Connection: close", "", ""]
            self.transport.write("\r\n".join(head).encode("ascii") + body)
        self.transport.close()
