"""What a person types into a chat, or a pipe brings: messages of one line or more, and commands."""

from __future__ import annotations

import contextlib
import itertools
import re
import sys
from dataclasses import dataclass

from bitnet_mlx.errors import ConfigError

_QUOTES = '"""'


@dataclass(frozen=True)
class Message:
    """What came. command: it is one line that begins like /help."""

    text: str
    command: bool = False


class Reader:
    """Messages from stdin. On a terminal lines can be edited, and earlier ones fetched with the arrow keys."""

    def __init__(self) -> None:
        self.person = sys.stdin.isatty()
        self._edited = self.person and sys.stdout.isatty()
        self._lines = itertools.count(1)
        if self._edited:
            with contextlib.suppress(ImportError):  # Windows has none; its terminal edits by itself
                import readline  # noqa: F401

    def read(self) -> Message | None:
        """The next message that is not blank; None at the end. Raises ConfigError for bytes that are not UTF-8."""
        while (line := self._line("> ")) is not None:
            text = line.strip()
            if text.startswith(_QUOTES):
                return Message(self._block(text[len(_QUOTES) :]))
            while line is not None and text.endswith("\\"):
                line = self._line(". ")
                text = f"{text[:-1]}\n{(line or '').strip()}"
            if text.strip():
                return Message(text, bool(re.match(r"/[a-z]+(\s|$)", text)) and "\n" not in text)
        return None

    def _block(self, text: str) -> str:
        while not text.rstrip().endswith(_QUOTES) and (line := self._line(". ")) is not None:
            text += "\n" + line.rstrip("\r\n")
        return text.rstrip().removesuffix(_QUOTES)

    def _line(self, prompt: str) -> str | None:
        number = next(self._lines)
        try:
            if self._edited:
                try:
                    return input(prompt)
                except EOFError:
                    return None
            if self.person:
                print(prompt, end="", file=sys.stderr, flush=True)
            line = sys.stdin.buffer.readline()
            return line.decode("utf-8") if line else None
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"[chat] line {number} of stdin is not UTF-8 ({error.reason} at byte {error.start}); convert it first"
            ) from error
