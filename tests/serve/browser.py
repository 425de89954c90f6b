"""A real Chromium without a window, told what to do over two pipes (its DevTools protocol), with nothing to install for it."""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
PROGRAM = next(filter(None, map(shutil.which, NAMES)), None)
PATIENCE = 60.0  # seconds, far more than anything takes
FLAGS = (
    "--headless", "--remote-debugging-pipe", "--no-first-run", "--no-default-browser-check", "--disable-gpu",
    "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-extensions", "--hide-scrollbars", "--mute-audio", "--no-sandbox",
)  # fmt: skip


class Page:
    """One tab. `asked`: the address of every request that it made. `problems`: what it complained of."""

    def __init__(self, send: int, receive: int) -> None:
        self._send, self._receive, self._held = send, receive, b""
        self._numbers = itertools.count(1)
        self._session: str | None = None
        self.asked: list[str] = []
        self.problems: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol, and its answer."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while True:
            heard = self._next()
            if heard.get("id") == number:
                assert "error" not in heard, heard
                return heard["result"]
            self._hear(heard)

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while b"\0" not in self._held:
            assert select.select([self._receive], [], [], max(0.0, end - time.monotonic()))[0], "the browser is silent"
            data = os.read(self._receive, 1 << 16)
            assert data, "the browser has ended"
            self._held += data
        line, _, self._held = self._held.partition(b"\0")
        return json.loads(line)

    def _hear(self, heard: dict[str, Any]) -> None:
        method, told = heard.get("method"), heard.get("params", {})
        if method == "Network.requestWillBeSent":
            self.asked.append(told["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.problems.append(str(told["exceptionDetails"]))
        elif method == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.problems.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def value(self, expression: str) -> Any:
        """A JavaScript expression's value."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, expression: str, check: Callable[[Any], bool] = bool) -> Any:
        """Wait until the expression's value passes; the value."""
        end = time.monotonic() + PATIENCE
        while not check(value := self.value(expression)):
            assert time.monotonic() < end, f"{expression} is {value!r}: {self.value('document.body.innerText')!r}"
            time.sleep(0.02)
        return value

    def type(self, text: str) -> None:
        """As a person types, into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, code: int, shift: bool = False) -> None:
        text = "\r" if key == "Enter" else ""
        told = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **told)
        self.call("Input.dispatchKeyEvent", type="keyUp", **told)

    def look(self, width: int, height: int, scheme: str) -> None:
        """Take a size, and prefer "dark" or "light"."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def picture(self, path: Path) -> bytes:
        """A PNG of what is to be seen; also written to path."""
        data = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        path.write_bytes(data)
        return data


@contextmanager
def browsing(profile: Path) -> Iterator[Page]:
    """A tab of a browser that ends with the block. profile: an empty folder for what it keeps."""
    assert PROGRAM
    send, receive, process = _started([PROGRAM, *FLAGS, f"--user-data-dir={profile}", "about:blank"], str(profile))
    try:
        yield Page(send, receive)
    finally:
        os.close(send)  # it ends when nobody tells it anything any more
        end = time.monotonic() + 10
        while os.waitpid(process, os.WNOHANG) == (0, 0):
            if time.monotonic() > end:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
                break
            time.sleep(0.02)
        os.close(receive)


def _started(command: list[str], home: str) -> tuple[int, int, int]:
    """(where to write to it, where to read from it, its process id). Chromium reads from 3 and writes to 4."""
    ends = [*os.pipe(), *os.pipe()]
    read, send, receive, write = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    actions = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in (0, 1, 2)]
    actions += [(os.POSIX_SPAWN_DUP2, read, 3), (os.POSIX_SPAWN_DUP2, write, 4)]
    process = os.posix_spawn(command[0], command, {**os.environ, "HOME": home}, file_actions=actions)
    os.close(read)
    os.close(write)
    return send, receive, process
