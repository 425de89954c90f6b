"""Ids to text, one token at a time, never half a character. Whole decoding is the same code run to the end."""

from __future__ import annotations

import codecs
import re
from typing import Protocol

from bitnet_mlx.tokenizer.pieces import Pieces

_LONE_BYTE = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of a byte outside any character


class HasPieces(Protocol):
    """What the detokenizer needs of a tokenizer."""

    @property
    def pieces(self) -> Pieces: ...

    @property
    def special_ids(self) -> frozenset[int]: ...


class Detokenizer:
    """Feed ids with `add`, which returns the text that became complete; `finalize` returns what is left.

    The returned strings joined are exactly `tokenizer.decode(ids, skip_special_tokens)`. A token costs constant time.
    Bytes that cannot become a character give U+FFFD as soon as that is certain. Where byte-fallback tokens hold a
    damaged sequence, its whole characters are kept, as sentencepiece does (`tokenizers` drops the whole run).
    """

    def __init__(
        self, tokenizer: HasPieces, skip_special_tokens: bool = True, shown: frozenset[int] = frozenset()
    ) -> None:
        """shown: special tokens that are not skipped (those that frame a tool call)."""
        self._pieces = tokenizer.pieces
        self._skip = tokenizer.special_ids - shown if skip_special_tokens else frozenset()
        errors = "surrogateescape" if self._pieces.per_byte else "replace"
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)
        self._leading = self._pieces.leading

    def add(self, token: int) -> str:
        """Add one id; returns the new text that no later token can change."""
        if token in self._skip:
            return ""
        piece = self._pieces[token]
        if isinstance(piece, bytes):
            if self._leading != "text":
                self._leading = "keep"
            text = self._decoder.decode(piece)
        else:
            text = self._decoder.decode(b"", True) + self._first(piece)
            self._decoder.reset()
        return self._clean(text)

    def finalize(self) -> str:
        """The end of the text: an unfinished character becomes U+FFFD. The object is then as new."""
        text = self._clean(self._decoder.decode(b"", True))
        self._decoder.reset()
        self._leading = self._pieces.leading
        return text

    def _first(self, piece: str) -> str:
        """Take off the leading spaces that stand in the first piece."""
        if self._leading in ("keep", "text") or not piece:
            return piece
        if self._leading == "piece":
            piece = piece.removeprefix(" ")
        elif self._leading == "pieces":
            piece = piece.lstrip(" ")
            if not piece:
                return piece  # the next one is still the first that shows
        else:
            piece = piece.replace(" ", "")
        self._leading = "keep"
        return piece

    def _clean(self, text: str) -> str:
        if self._pieces.per_byte and not text.isascii():
            text = _LONE_BYTE.sub("\ufffd", text)
        if text and self._leading == "text":
            self._leading = "keep"
            return text.removeprefix(" ")
        return text
