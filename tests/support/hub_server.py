"""A small server on 127.0.0.1 that speaks as much of the Hugging Face hub's protocol as downloads and uploads need.

Uploads: create a repository, preupload (which files are large), Git LFS's batch and its PUTs, and the commit as lines of
JSON, small files within. Xet storage is not there: clients that upload are to have HF_HUB_DISABLE_XET=1.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

COMMIT = "c0ffee" + "0" * 34
WRITER, READER = "hf_writer", "hf_reader"  # tokens; others are unknown


class HubServer(ThreadingHTTPServer):
    """repos: name -> folder of files. gated: names that need terms accepted. asked: paths of all requests.

    made: where the folders of new repositories are put. objects: large files by their sha256. commits: for each, the names
    that came inline and those that came as large files. breaks: repositories whose commits get no answer.
    """

    def __init__(self, repos: dict[str, Path], gated: frozenset[str] = frozenset(), made: Path | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos, self.gated, self.made = repos, gated, made
        self.asked: list[str] = []
        self.objects: dict[str, bytes] = {}
        self.commits: list[tuple[list[str], list[str]]] = []
        self.breaks: set[str] = set()

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
        revision = api[3] if api else file[2] if file else ""
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
        self._json(200, body)

    def _file(self, path: Path) -> None:
        if path.is_file():
            self._send(200, path.read_bytes(), {"ETag": f'"{_sha(path)}"', "X-Repo-Commit": COMMIT})
        else:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})

    def do_POST(self) -> None:
        path, body = self._received()
        role = self.headers.get("Authorization", "").removeprefix("Bearer ")
        repo = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path)
        batch = re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path)
        if role not in (WRITER, READER):
            self._json(401, {"error": "Invalid username or password."})
        elif role == READER:
            self._json(403, {"error": "You don't have the rights to create a model there"})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._validate(json.loads(body)["content"])
        elif repo and repo[1] in self.server.repos:
            (self._preupload if repo[2] == "preupload" else self._commit)(repo[1], body)
        elif batch and batch[1] in self.server.repos:
            self._batch(json.loads(body)["objects"])
        else:
            self._json(404, {}, {"X-Error-Code": "RepoNotFound"})

    def do_PUT(self) -> None:
        path, body = self._received()
        oid = path.removeprefix("/lfs/")
        if hashlib.sha256(body).hexdigest() == oid:
            self.server.objects[oid] = body
            self._json(200, {})
        else:
            self._json(400, {"error": f"the content is not {oid}"})

    def _received(self) -> tuple[str, bytes]:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(path)
        return path, self.rfile.read(int(self.headers["Content-Length"]))

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        there = name in self.server.repos
        if not there:
            if self.server.made is None:
                raise ValueError("the server was not told where to make repositories")
            self.server.repos[name] = self.server.made / name
            self.server.repos[name].mkdir(parents=True)
        self._json(409 if there else 200, {"url": f"{self.server.url}/{name}"})

    def _validate(self, text: str) -> None:
        """A card's metadata has to be a mapping between two lines of dashes."""
        parts = text.split("---\n")
        fine = len(parts) >= 3 and parts[0] == "" and isinstance(yaml.safe_load(parts[1]), dict)
        self._json(200 if fine else 400, {"errors": [] if fine else [{"message": "no metadata"}], "warnings": []})

    def _preupload(self, name: str, body: bytes) -> None:
        """Binary files are large ones."""
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if b"\0" in base64.b64decode(file["sample"]) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._json(200, {"files": files})

    def _batch(self, objects: list[dict[str, Any]]) -> None:
        """Where to PUT each object; those that are here need not come again."""
        answer: list[dict[str, Any]] = [{"oid": item["oid"], "size": item["size"]} for item in objects]
        for item in answer:
            if item["oid"] not in self.server.objects:
                item["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{item['oid']}"}}
        self._json(200, {"transfer": "basic", "objects": answer})

    def _commit(self, name: str, body: bytes) -> None:
        if name in self.server.breaks:
            self.close_connection = True
            return None
        lines = [json.loads(line) for line in body.splitlines()]
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
        }
        large = {line["value"]["path"]: line["value"]["oid"] for line in lines if line["key"] == "lfsFile"}
        if lines[0]["key"] != "header" or len(files) + len(large) != len(lines) - 1:
            return self._json(400, {"error": "lines that are not known"})
        if not set(large.values()) <= self.server.objects.keys():
            return self._json(400, {"error": "large files that never came"})
        for path, content in [*files.items(), *((path, self.server.objects[oid]) for path, oid in large.items())]:
            target = self.server.repos[name] / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        self.server.commits.append((sorted(files), sorted(large)))
        return self._json(
            200, {"commitUrl": f"{self.server.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
        )

    def _json(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _sha(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextmanager
def serving(
    repos: dict[str, Path], gated: frozenset[str] = frozenset(), made: Path | None = None
) -> Iterator[HubServer]:
    """The server, in a thread of its own, for the time of the block."""
    with HubServer(repos, gated, made) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
