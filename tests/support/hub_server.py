"""A small server on 127.0.0.1 that speaks as much of the Hugging Face hub's protocol as a download needs."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


class HubServer(ThreadingHTTPServer):
    """repos: name -> folder of files. gated: names that need terms accepted. asked: paths of all requests."""

    def __init__(self, repos: dict[str, Path], gated: frozenset[str] = frozenset()) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos, self.gated = repos, gated
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(path)
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = api or file
        name = match[1] if match else ""
        revision = match[3] if api else match[2] if match else ""
        if name in self.server.gated:
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        elif name not in self.server.repos:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", COMMIT):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif api:
            self._listing(self.server.repos[name], name, api[2])
        else:
            self._file(self.server.repos[name] / (file[3] if file else ""))

    def _listing(self, folder: Path, name: str, kind: str) -> None:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [path.relative_to(folder).as_posix() for path in files]
        if kind == "revision":
            body: object = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in names]}
        else:
            sizes = [path.stat().st_size for path in files]
            body = [
                {"type": "file", "path": file, "size": size, "oid": _sha(folder / file)}
                for file, size in zip(names, sizes, strict=True)
            ]
        self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _file(self, path: Path) -> None:
        if path.is_file():
            self._send(200, path.read_bytes(), {"ETag": f'"{_sha(path)}"', "X-Repo-Commit": COMMIT})
        else:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _sha(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextmanager
def serving(repos: dict[str, Path], gated: frozenset[str] = frozenset()) -> Iterator[HubServer]:
    """The server, in a thread of its own, for the time of the block."""
    with HubServer(repos, gated) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
