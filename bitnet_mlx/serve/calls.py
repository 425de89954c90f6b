"""Tool calls in a text that comes piece by piece: what is said, and what is called."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bitnet_mlx.generation.stops import overlap
from bitnet_mlx.serve.tools import ToolFormat

# What mlx-lm's parsers raise for a text that is no call of theirs.
_NOT_A_CALL = (ValueError, LookupError, TypeError, AttributeError, SyntaxError, RecursionError)
# How a call begins that a grammar enforces (tools.call_grammar), up to the object of its arguments.
_OPENING = re.compile(r'\s*\{\s*"name":\s*"([^"\\]*)",\s*"arguments":\s*(?=\{)')


@dataclass
class Said:
    """What a stretch of text amounts to. calls: OpenAI's tables; of a call told in pieces, more arguments under its index.

    thought: what came before the answer (generation/thinking.py).
    """

    content: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    thought: str = ""


class CallReader:
    """Feed a text as it comes. Calls come out whole; what looks like one and is none, is content. Where a grammar is in force
    that lets nothing else follow a mark, a call comes out as it is written, its arguments to the letter.

    Blank space around calls belongs to nobody. However the text is cut, the sum of what comes out is the same.
    """

    def __init__(self, form: ToolFormat, tools: Sequence[dict[str, Any]], enforced: bool = False) -> None:
        """enforced: the text obeys tools.call_grammar."""
        self._form, self._tools, self._enforced = form, list(tools), enforced
        self._inside = False
        self._arguments: _Object | None = None  # of the call that is being told in pieces
        self._held = ""  # the start of a mark or of a call, or blank space that a call may follow
        self._blank = ""  # what stood before the call that is being read
        self.calls = 0
        self.cut = False  # whether the last of them was cut short by a stop string or its length

    def feed(self, text: str, last: bool = False) -> Said:
        """What has become certain. last: no more text will come."""
        said = Said()
        self._held += text
        while self._inside or self._form.start in self._held:
            if not self._inside:
                before, _, self._held = self._held.partition(self._form.start)
                certain = before.rstrip()
                said.content += certain
                self._inside, self._blank = True, before[len(certain) :]
            if self._enforced:
                self._tell_written(said)
            inner, end, after = self._held.partition(self._form.end) if self._form.end else (self._held, "", "")
            if not end and not last:
                return said
            self._inside, self._held = False, after
            if self._arguments is None:
                self._call(said, inner, end)
            else:
                self.cut, self._arguments = not self._arguments.ended, None
        self._say_certain(said, last)
        return said

    def _tell_written(self, said: Said) -> None:
        """The call that is being read, as far as it is written; nothing before its arguments begin."""
        if self._arguments is None:
            opening = _OPENING.match(self._held)
            if opening is None:
                return
            self._arguments, self._held = _Object(), self._held[opening.end() :]
            said.calls.append({"index": self.calls, **_table(opening[1], "")})
            self.calls += 1
        written, self._held = self._arguments.take(self._held)
        if not written:
            return
        if not said.calls:  # else the last of them is this one
            said.calls.append({"index": self.calls - 1, "function": {"arguments": ""}})
        said.calls[-1]["function"]["arguments"] += written

    def _say_certain(self, said: Said, last: bool) -> None:
        """What is held can be said but for a mark's beginning and blank space; at the end, all of it."""
        if last and self.calls:
            certain = self._held.rstrip()
            self._held = ""
        elif last:
            certain, self._held = self._held, ""
        else:
            size = len(self._held) - overlap(self._held, self._form.start)
            size = len(self._held[:size].rstrip())
            certain, self._held = self._held[:size], self._held[size:]
        said.content += certain

    def _call(self, said: Said, inner: str, end: str) -> None:
        try:
            read = self._form.read(inner, self._tools)
            calls = [_made(call) for call in (read if isinstance(read, list) else [read])]
        except _NOT_A_CALL:
            said.content += self._blank + self._form.start + inner + end
            return
        for call in calls:
            said.calls.append({"index": self.calls, **call})
            self.calls += 1


def _made(call: Any) -> dict[str, Any]:
    """A parser's table as OpenAI's. Raises for one that is no call."""
    name, arguments = call["name"], call.get("arguments", {})
    if not isinstance(name, str) or not isinstance(arguments, (dict, str)):
        raise TypeError("a name and arguments are expected")
    if isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return _table(name, arguments)


def _table(name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


class _Object:
    """A JSON object in a text that comes piece by piece: where it ends."""

    def __init__(self) -> None:
        self._depth, self._quoted, self._escaped, self.ended = 0, False, False, False

    def take(self, text: str) -> tuple[str, str]:
        """(what belongs to it, what comes after)."""
        for at, letter in enumerate(text):
            if self.ended:
                return text[:at], text[at:]
            if self._quoted:
                self._quoted = letter != '"' or self._escaped
                self._escaped = letter == "\\" and not self._escaped
            elif letter == '"':
                self._quoted = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                self.ended = not self._depth
        return text, ""
