"""Tool calls in a text that comes piece by piece: what is said, and what is called."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bitnet_mlx.generation.stops import overlap
from bitnet_mlx.serve.tools import ToolFormat

# What mlx-lm's parsers raise for a text that is no call of theirs.
_NOT_A_CALL = (ValueError, LookupError, TypeError, AttributeError, SyntaxError, RecursionError)


@dataclass
class Said:
    """What a stretch of text amounts to. calls: (name, arguments as JSON)."""

    content: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)


class CallReader:
    """Feed a text as it comes. Calls come out whole; what looks like one and is none, is content.

    Blank space around calls belongs to nobody. However the text is cut, the sum of what comes out is the same.
    """

    def __init__(self, form: ToolFormat, tools: Sequence[dict[str, Any]]) -> None:
        self._form, self._tools = form, list(tools)
        self._inside = False
        self._held = ""  # the start of a mark or of a call, or blank space that a call may follow
        self._blank = ""  # what stood before the call that is being read
        self.calls = 0

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
            inner, end, after = self._held.partition(self._form.end) if self._form.end else (self._held, "", "")
            if not end and not last:
                return said
            self._inside, self._held = False, after
            self._call(said, inner, end)
        self._say_certain(said, last)
        return said

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
    function = {"name": name, "arguments": arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
