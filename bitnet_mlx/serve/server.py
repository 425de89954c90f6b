"""Sockets and signals: uvicorn around the application, on an address of our own choosing."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import uvicorn

from bitnet_mlx.errors import ServeError
from bitnet_mlx.serve.connection import HEAD_SECONDS, Connection

_OURS = ("localhost", "127.0.0.1", "[::1]", "host.docker.internal")  # the last: this machine, from inside a container
_KEEP_SECONDS = (
    30  # an idle connection: longer than clients keep theirs, or one may send into a connection being closed
)
_HEAD_BYTES = 32 << 10  # a request's first line and headers


class Server(uvicorn.Server):
    """Ends on SIGTERM and SIGINT once the answers in progress are through, at most `drain_seconds` later."""

    def __init__(
        self, app: Any, listening: socket.socket, drain_seconds: float = 30.0, head_seconds: float = HEAD_SECONDS
    ) -> None:
        """head_seconds: that a client has for a request's headers."""
        protocol: Any = partial(Connection, head_seconds=head_seconds)
        super().__init__(
            uvicorn.Config(
                app, http=protocol, ws="none", lifespan="on", log_config=None, access_log=False, server_header=False,
                timeout_keep_alive=_KEEP_SECONDS,
                h11_max_incomplete_event_size=_HEAD_BYTES, timeout_graceful_shutdown=max(1, round(drain_seconds)),
            )
        )  # fmt: skip
        self._listening = listening

    def serve_until_told(self) -> None:
        """Run on this thread."""
        self.run(sockets=[self._listening])

    @contextmanager
    def capture_signals(self) -> Iterator[None]:  # type: ignore[override]
        """As uvicorn's, but the signal is not raised again at the end: a drained server ends well."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ServeError where the address cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=256)
    except (OSError, OverflowError) as error:
        raise ServeError(
            f"[serve] {host}:{port} cannot be listened on ({error}); choose another --port (0 takes a free one) or --host"
        ) from error


def host_names(listening: socket.socket, more: Sequence[str]) -> tuple[str, ...]:
    """The names that requests may ask for: any where others can reach the socket, else this machine's own and `more`."""
    address = listening.getsockname()[0]
    return (*_OURS, *(name.lower() for name in more)) if address.startswith("127.") or address == "::1" else ()
