"""The text of one token: what a tokenizer's decoder makes of it before neighbours matter.

Three things cross token borders, and the detokenizer handles them: bytes that form one character, runs of byte-fallback
tokens, and the leading space that sentencepiece adds in front of the first word.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from bitnet_mlx.errors import UnsupportedModelError

Leading = Literal["keep", "text", "piece", "pieces", "first_token"]
SPACE = "\u2581"  # sentencepiece's visible space


@dataclass
class Pieces:
    """`make(id)` gives a token's bytes, or its text where the token ends any run of bytes before it.

    leading: which spaces at the very start are not part of the text. keep: all are. text: one is not. piece: one is
    not, if the first piece holds it. pieces: none that pieces hold is. first_token: none of the first token's is.
    per_byte: a byte that belongs to no character gives one U+FFFD each (sentencepiece), else one per broken sequence.
    """

    make: Callable[[int], str | bytes]
    leading: Leading = "keep"
    per_byte: bool = False
    _known: dict[int, str | bytes] = field(default_factory=dict)

    def __getitem__(self, token: int) -> str | bytes:
        piece = self._known.get(token)
        if piece is None:
            piece = self._known[token] = self.make(token)
        return piece


def byte_level_pieces(text_of: Callable[[int], str | None]) -> Pieces:
    """GPT-2's byte-level BPE: every character of a token stands for one byte; other tokens are their own UTF-8."""
    table = _byte_of_character()

    def make(token: int) -> bytes:
        text = text_of(token) or ""
        try:
            return bytes(table[c] for c in text)
        except KeyError:  # an added token with a character outside the table
            return text.encode("utf-8")

    return Pieces(make)


def _byte_of_character() -> dict[str, int]:
    """The printable bytes of Latin-1 stand for themselves; the other 68 are numbered from U+0100."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(b): b for b in plain}
    others = [b for b in range(256) if chr(b) not in table]
    table.update({chr(0x100 + i): b for i, b in enumerate(others)})
    return table


def fallback_byte(text: str) -> int | None:
    """The byte that "<0x0A>" stands for, or None."""
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        try:
            return int(text[3:5], 16)
        except ValueError:
            return None
    return None


def pieces_from_decoder(state: dict[str, Any] | None, text_of: Callable[[int], str | None]) -> Pieces:
    """Read the "decoder" of a tokenizer.json. Raises UnsupportedModelError for one that this cannot stream."""
    steps = _flatten(state)
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return byte_level_pieces(text_of)
    replacements: list[tuple[str, str]] = []
    leading: Leading = "keep"
    fallback = fused = False
    for step in steps:
        kind = step["type"]
        if kind == "Replace" and not fused and "String" in step["pattern"]:
            replacements.append((step["pattern"]["String"], step["content"]))
        elif kind == "Metaspace" and not fused:
            replacements.append((step["replacement"], " "))
            leading = "keep" if step.get("prepend_scheme") == "never" else "first_token"
        elif kind == "ByteFallback" and not fused:
            fallback = True
        elif kind == "Fuse":
            fused = True
        elif kind == "Strip" and fused and (step["content"], step["start"], step["stop"]) == (" ", 1, 0):
            leading = "text"
        else:
            raise _unsupported(kinds)
    if not steps:
        raise _unsupported(kinds)

    def make(token: int) -> str | bytes:
        text = text_of(token) or ""
        byte = fallback_byte(text) if fallback else None
        if byte is not None:
            return bytes([byte])
        for old, new in replacements:
            text = text.replace(old, new)
        return text

    return Pieces(make, leading, per_byte=True)


def _flatten(state: dict[str, Any] | None) -> list[dict[str, Any]]:
    if state is None:
        return []
    if state["type"] == "Sequence":
        return [inner for step in state["decoders"] for inner in _flatten(step)]
    return [state]


def _unsupported(kinds: list[str]) -> UnsupportedModelError:
    found = ", ".join(kinds) or "none"
    return UnsupportedModelError(
        f"[tokenizer] tokenizer.json has the decoder {found}; byte-level and sentencepiece-like decoders (Replace, "
        "Metaspace, ByteFallback, Fuse, Strip of a leading space) are supported; convert the tokenizer to one of them"
    )
