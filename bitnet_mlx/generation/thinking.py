"""What a model thinks before it answers: <think>, its thoughts, </think>, the answer. Blank lines at the seams are nobody's.

A model is taken to think where its chat template knows the marks. Thoughts stand at the very beginning of a text, and the
prompt may have begun them; marks anywhere else are text like any other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Literal

from bitnet_mlx.generation.stops import overlap
from bitnet_mlx.tokenizer import Tokenizer

START, END = "<think>", "</think>"
_LOOKED_AT = 32  # tokens at a prompt's end: a mark takes one, or a few where the vocabulary lacks it
# Where a prompt ends: thoughts may come, have been begun, or are over (thinking was switched off).
Place = Literal["before", "inside", "after"]


def thinks(tokenizer: Tokenizer) -> bool:
    """Whether the model thinks before it answers."""
    return END in (tokenizer.chat_template or "")


def place(tokenizer: Tokenizer, ids: Sequence[int]) -> Place:
    """Where a prompt from the chat template ends."""
    end = tokenizer.decode(ids[-_LOOKED_AT:]).rstrip()
    return "inside" if end.endswith(START) else "after" if end.endswith(END) else "before"


def special_marks(tokenizer: Tokenizer) -> dict[str, int]:
    """Those of the marks that are special tokens, which a text would leave out."""
    ids = {mark: tokenizer.token_to_id(mark) for mark in (START, END)}
    return {mark: i for mark, i in ids.items() if i is not None and i in tokenizer.special_ids}


def after_thoughts(grammar: str, place: Place, special: Mapping[str, int]) -> str:
    """A grammar (Lark's, beginning with "start:") of texts that may be thought about first, in whatever words.

    special: as special_marks gives them.
    """
    start, end = (f"<[{special[mark]}]>" if mark in special else json.dumps(mark) for mark in (START, END))
    thoughts = {"before": f"({start} thoughts GAP)? ", "inside": "thoughts GAP ", "after": ""}[place]
    # A lazy rule ends as soon as it can, at the first mark. A special token ends it anyway.
    lazy = "" if END in special else "[lazy]"
    return rf"""start: {thoughts}said
thoughts{lazy}: THOUGHT {end}
THOUGHT: /(.|\n)*/
GAP: /\n{{0,2}}/
said:{grammar.removeprefix("start:")}
"""


class ThoughtReader:
    """Feed a text as it comes, token by token: what is thought and what is said come out apart, without the marks.

    However the text is cut, the sums of what comes out are the same.
    """

    def __init__(self, inside: bool = False, call: str = "") -> None:
        """inside: the prompt has begun the thoughts. call: how a tool call begins, which ends thoughts that were left open."""
        self._ends = [END, call] if call else [END]
        self._place: Place = "inside" if inside else "before"
        self._held = ""  # what may be the beginning of a mark, or a seam
        self._thought, self._seam = inside, True
        self._fed = 0

    @property
    def tokens(self) -> int:
        """How many times it was fed up to the end of the thoughts; 0 where there are none."""
        return self._fed if self._thought else 0

    def feed(self, text: str, last: bool = False) -> tuple[str, str]:
        """(what is thought, what is said), as far as it is certain. last: no more text will come."""
        self._fed += self._place != "after"
        self._held += text
        if self._place == "before":
            self._begin(last)
        thought = self._think(last) if self._place == "inside" else ""
        return thought, self._say() if self._place == "after" else ""

    def _begin(self, last: bool) -> None:
        begun = self._held.lstrip()
        if begun.startswith(START):
            self._place, self._held, self._thought = "inside", begun[len(START) :], True
        elif last or not START.startswith(begun):
            self._place, self._seam = "after", False

    def _think(self, last: bool) -> str:
        found = [(at, end) for end in self._ends if (at := self._held.find(end)) >= 0]
        at, end = min(found, default=(len(self._held), ""))
        if not (end or last):
            at -= max(overlap(self._held, mark) for mark in self._ends)
        inner = self._held[:at].rstrip("\n")
        rest = self._held[len(inner) :]  # a seam, and what may be a mark
        if end:
            self._place = "after"
            rest = rest.lstrip("\n").removeprefix(END)  # a call's mark is part of what is said
        self._held = "" if last and not end else rest
        thought = self._without_seam(inner)
        self._seam = self._seam or bool(end)
        return thought

    def _say(self) -> str:
        said, self._held = self._held, ""
        return self._without_seam(said)

    def _without_seam(self, text: str) -> str:
        text = text.lstrip("\n") if self._seam else text
        self._seam = self._seam and not text
        return text
