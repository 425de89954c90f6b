"""chat on a real pseudo-terminal: Ctrl-C stops an answer, the session lives on, the second one or Ctrl-D leaves."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from bitnet_mlx.cli.chat_answer import Stop
from bitnet_mlx.cli.speculation import told
from bitnet_mlx.generation.steps import SpeculationReport

pty = pytest.importorskip("pty")
ROOT = Path(__file__).resolve().parents[2]
# The terminal becomes the child's own, and Ctrl-C is not ignored, as it is by whatever a script starts in the background: it
# then reaches the child as it reaches any program.
CHILD = """
import fcntl, runpy, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv[0] = "bitnet-mlx"
runpy.run_module("bitnet_mlx", run_name="__main__")
"""
PATIENCE = 60.0  # seconds, far more than anything here takes


class Terminal:
    """What a person has before them: `shown` is all that appeared."""

    def __init__(self, master: int, process: subprocess.Popen[bytes]) -> None:
        self._master, self.process, self.shown = master, process, ""

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def until(self, pattern: str, start: int = 0) -> int:
        """Wait until something appears behind `start`; where it ends."""
        end = time.monotonic() + PATIENCE
        while not (found := re.compile(pattern).search(self.shown, start)):
            assert time.monotonic() < end, f"no {pattern!r} in {self.shown[start:]!r}"
            if select.select([self._master], [], [], 1.0)[0]:
                try:
                    data = os.read(self._master, 4096)
                except OSError:  # Linux says so when the child has gone; elsewhere nothing is read
                    data = b""
                assert data, f"it ended: {self.shown!r}"
                self.shown += data.decode("utf-8", "replace")
        return found.end()

    def interrupt(self) -> None:
        """Ctrl-C at a prompt. It is typed once the child waits for a key: between its prompt and that wait CPython's
        readline loop keeps a signal to itself until the next key, which no person is fast enough to meet.
        """
        child = psutil.Process(self.process.pid)
        asleep = (psutil.STATUS_SLEEPING, psutil.STATUS_RUNNING)[
            : 2 if sys.platform == "darwin" else 1
        ]  # macOS's word for it
        end, before = time.monotonic() + PATIENCE, None
        while (now := (child.status(), child.cpu_times())) != before or now[0] not in asleep:
            assert time.monotonic() < end, f"it does not come to rest: {self.shown!r}"
            before = now
            time.sleep(0.2)
        self.type("\x03")

    def left(self) -> int:
        """Its exit code, once it has ended."""
        with pytest.raises(AssertionError, match="^it ended"):
            self.until("(?!)")  # matches nothing
        return self.process.wait(PATIENCE)


@contextmanager
def chat(*arguments: str) -> Iterator[Terminal]:
    master, slave = pty.openpty()
    command = [sys.executable, "-c", CHILD, "chat", "--ignore-chat-template", "--temp", "0", *arguments]
    environment = {**os.environ, "TERM": "dumb"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=slave, stdout=slave, stderr=slave, start_new_session=True
    ) as process:
        os.close(slave)
        try:
            yield Terminal(master, process)
        finally:
            process.kill()
            os.close(master)


def test_stopping_going_on_and_leaving(tmp_path: Path) -> None:
    with chat("--backend", "numpy", "--max-tokens", "900") as terminal:
        at = terminal.until("> ")
        terminal.type("def read_config(path):\n")
        at = terminal.until(r"read_config\(path\):\s+\S+[^>]*\S", at)  # its echo, then an answer that has begun
        terminal.type("\x03")
        at = terminal.until(r"\[numpy\] (\d+) tokens at .* \(stopped\); context (\d+) of 1024\s+> ", at)
        made, used = map(int, re.findall(r"\[numpy\] (\d+) tokens .* context (\d+) of", terminal.shown)[-1])
        assert 0 < made < 900 and used > made, "the part that was made stays"
        terminal.type("/save " + str(tmp_path / "talk.st") + "\n")
        at = terminal.until(rf"{used} tokens\s+> ", at)
        terminal.type("/nonsense\n")
        at = terminal.until("/nonsense is no command.*\\s+> ", at)
        terminal.type('"""\n\nimport os\n"""\n')
        at = terminal.until(r'\. [^>]*"""\s+\S[^>]*\S', at)
        terminal.type("\x03")
        at = terminal.until(r"\(stopped\); context (\d+) of 1024\s+> ", at)
        assert int(re.findall(r"context (\d+) of", terminal.shown)[-1]) > used
        terminal.type("half a line")
        terminal.until("half a line", at)
        terminal.interrupt()
        assert terminal.left() == 0, "the answer's Ctrl-C was the first one"
    with chat("--backend", "numpy", "--max-tokens", "2", "--prompt-cache-file", str(tmp_path / "talk.st")) as terminal:
        at = terminal.until("> ")
        terminal.interrupt()
        at = terminal.until("Ctrl-C again, Ctrl-D or /exit leaves.*\\s+> ", at)
        terminal.type("x\n")
        at = terminal.until(r"\[numpy\] 2 tokens at .* context (\d+) of 1024\s+> ", at)
        assert int(re.findall(r"context (\d+) of", terminal.shown)[-1]) > used
        terminal.interrupt()
        at = terminal.until("leaves.*\\s+> ", at)
        terminal.type("\x04")
        assert terminal.left() == 0 and "Traceback" not in terminal.shown


def test_two_at_once_interrupt_and_nothing_is_lost() -> None:
    with chat("--backend", "numpy", "--max-tokens", "900") as terminal:
        at = terminal.until("> ")
        terminal.type("import \n")
        at = terminal.until(r"import \s+\S", at)
        terminal.type("\x03\x03")
        at = terminal.until("> ", at)
        terminal.type("/exit\n")
        assert terminal.left() == 0 and "Traceback" not in terminal.shown


def test_what_ctrl_c_stops_within_an_answer() -> None:
    """Between two parts of a prompt the first one ends it; a second one does not wait. Then it is as it was before."""
    before, seen = signal.getsignal(signal.SIGINT), []
    with Stop(person=True) as stop:
        tell = stop.watching(lambda *where: seen.append(where))
        tell(1, 3)
        signal.raise_signal(signal.SIGINT)
        assert stop.asked and list(stop.until(iter("ab"))) == ["a"]
        with pytest.raises(KeyboardInterrupt):
            tell(2, 3)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert seen == [(1, 3), (2, 3)] and signal.getsignal(signal.SIGINT) is before
    with Stop(person=False) as stop:
        assert signal.getsignal(signal.SIGINT) is before
        stop.watching(None)(1, 3)


def test_what_guessing_gave_in_a_line() -> None:
    report = SpeculationReport("draft model", 40, 10, 0.25, 9, None, None)
    assert told(report) == ", draft model: 10 of 40 guesses right (25%)"
    ended = replace(report, off="no gain", gain=0.876)
    assert told(ended) == ", draft model: 10 of 40 guesses right (25%), 0.88 times the speed, switched off"
