"""Grammars: which tokens may come next, so that a text is what was asked for (JSON of a schema, a regular expression).

llguidance does the parsing; here it is given a vocabulary, and its masks are laid over a model's scores. It is imported
late and belongs to the extra `serve`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bitnet_mlx.errors import BackendError, ConfigError
from bitnet_mlx.generation.thinking import Place, after_thoughts, special_marks
from bitnet_mlx.tokenizer import Tokenizer

# Between JSON's tokens: a space, or a new line and its indentation. More is what a model writes that is at a loss.
_BLANKS = r"( |\r?\n[ \t]{0,40})?"
_MOST_ITEMS = 500  # of the parser at one place; a step over them takes a tenth of a second
_MOST_ALTERNATIVES = 200  # of a schema at one place: its compilation takes time that grows with their square
_MARK = "\x02"  # a character that no token joins with what follows it


def library() -> Any:
    """llguidance. Raises ConfigError where it is not installed."""
    try:
        import llguidance
    except ImportError as error:
        raise ConfigError(
            f"[grammar] {error.name} is not installed; grammars need the extra: pip install 'bitnet-mlx[serve]'"
        ) from error
    return llguidance


class Grammar:
    """A compiled grammar over one vocabulary. Texts of it are made with `begin`, one object each."""

    def __init__(self, matcher: Any, size: int) -> None:
        self._matcher, self._size = matcher, size

    def begin(self) -> Constraint:
        """The constraint of one text, at its start."""
        return Constraint(self._matcher.deep_copy(), self._size)


class Constraint:
    """What may come next in one text. One thread at a time."""

    def __init__(self, matcher: Any, size: int) -> None:
        self._matcher, self._size = matcher, size

    @property
    def complete(self) -> bool:
        """Whether the text is whole and nothing but its end may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def masked(self, scores: np.ndarray) -> np.ndarray:
        """The scores [vocab] with -inf where a token may not follow: a new array.

        Raises BackendError where no token may, or the grammar is too involved at this place.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[: self._size].view(bool)
        self._check(bool(allowed.any()))
        return np.where(allowed, scores, np.float32(-np.inf))

    def accept(self, token: int) -> None:
        """The token that was chosen. Raises BackendError for one that `masked` forbids."""
        self._check(self._matcher.consume_token(token))

    def _check(self, good: bool) -> None:
        if self._matcher.is_error() or not good:
            why = self._matcher.get_error().partition("\n")[0] or "this vocabulary has no token that may follow"
            raise BackendError(f"[grammar] the text cannot go on: {why}; simplify the schema or the expression")


class Grammars:
    """Compiles grammars for a tokenizer whose model has `size` ids; stop_ids end a text.

    place: where the prompt ends, for a model that may think first; the grammar then begins behind its thoughts.
    Raises ConfigError where llguidance is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, size: int, stop_ids: frozenset[int]) -> None:
        llguidance = library()
        self._library, self._size = llguidance, size
        self._marks = special_marks(tokenizer)
        # A step of the grammar holds up every text of a batch: what would take it longer is refused.
        self._limits = llguidance.LLParserLimits(verbose_errors=False, max_items_in_row=_MOST_ITEMS)
        vocabulary = _Vocabulary(tokenizer, size)
        # A model that has no end token gets one past its last id, which no mask of ours shows.
        ends = sorted(i for i in stop_ids if i < size) or [size]
        wrapped = llguidance.TokenizerWrapper(vocabulary.with_end(ends[0]))
        self._tokenizer = llguidance.LLTokenizer(wrapped, eos_token=ends)

    def json_schema(self, schema: Mapping[str, Any], place: Place = "after") -> Grammar:
        """JSON that the schema allows. Raises ConfigError for a schema that is wrong, or more than can be enforced."""
        return self._compile(f"start: %json {json_rule(schema)}", "the JSON schema", place)

    def regex(self, pattern: str, place: Place = "after") -> Grammar:
        """A text that the whole expression matches (Rust's syntax: no look-around, no back-references)."""
        made = json.loads(self._library.LLMatcher.grammar_from_regex(pattern))
        return self._compile(made["grammars"][0]["lark_grammar"], "the regular expression", place)

    def choice(self, texts: Sequence[str], place: Place = "after") -> Grammar:
        """One of these texts."""
        source = "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
        return self._compile(source, "the choice", place)

    def lark(self, source: str, place: Place = "after") -> Grammar:
        """A text of a grammar in llguidance's variant of Lark's language."""
        return self._compile(source, "the grammar", place)

    def _compile(self, source: str, what: str, place: Place) -> Grammar:
        """Raises ConfigError for one that is wrong, or too much for its very first token."""
        source = source if place == "after" else after_thoughts(source, place, self._marks)
        grammar = self._library.LLMatcher.grammar_from_lark(source)
        matcher = self._library.LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        first = matcher.deep_copy()
        possible = not first.is_error() and any(first.compute_bitmask())
        if first.is_error() or not possible:
            lines = [line.strip() for line in first.get_error().splitlines() if line.strip()]
            lines = lines or ["no token of this vocabulary begins it"]
            said = next((line for line in reversed(lines) if line.startswith("error:")), lines[0])
            said = said.removeprefix("error: ").rpartition("failed to compile JSON schema: ")[2]
            raise ConfigError(f"[grammar] {what} cannot be enforced: {said}; change it")
        return Grammar(matcher, self._size)


def json_rule(schema: Mapping[str, Any], lenient: bool = False) -> str:
    """The schema as it stands in a grammar, after %json. lenient: what cannot be enforced is left out, not an error.

    Raises ConfigError for one of too many alternatives.
    """
    _alternatives(schema)
    options = {"whitespace_pattern": _BLANKS, "lenient": lenient}
    return json.dumps({**schema, "x-guidance": options})  # the library's own options are not the client's to set


def _alternatives(value: Any) -> int:
    """How many schemas may stand in the place of this one. Raises ConfigError for too many, here or below."""
    if isinstance(value, list):
        return sum(map(_alternatives, value))
    if not isinstance(value, Mapping):
        return 1
    counts = {key: _alternatives(part) for key, part in value.items()}
    count = max([1, *(counts[key] for key in ("anyOf", "oneOf") if key in counts)])
    if count > _MOST_ALTERNATIVES:
        raise ConfigError(
            f"[grammar] the JSON schema cannot be enforced: anyOf or oneOf has {count} alternatives at one place; at most "
            f"{_MOST_ALTERNATIVES} are allowed; an enum of as many values is no trouble"
        )
    return count


class _Vocabulary:
    """What llguidance asks of a tokenizer: bytes of every token, and how a text that must come is split."""

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        self._tokenizer = tokenizer
        self.bos_token_id = tokenizer.bos_token_id
        self.eos_token_id = 0
        self.special_token_ids = sorted(i for i in tokenizer.special_ids if i < size)
        self.tokens = [self._bytes(i) for i in range(size)]
        self._ids = {data: i for i, data in enumerate(self.tokens) if data and i not in tokenizer.special_ids}
        self._longest = max(map(len, self._ids), default=0)

    def with_end(self, token: int) -> _Vocabulary:
        """This vocabulary, its end token named; one past the last id is added."""
        self.eos_token_id = token
        if token == len(self.tokens):
            self.tokens.append(b"<end>")
            self.special_token_ids.append(token)
        return self

    def _bytes(self, token: int) -> bytes:
        if token in self._tokenizer.special_ids or token >= self._tokenizer.vocab_size:
            return (self._tokenizer.id_to_token(token) or "").encode()
        piece = self._tokenizer.pieces[token]
        return piece if isinstance(piece, bytes) else piece.encode()

    def __call__(self, text: str) -> list[int]:
        """The model's own way to split a text that stands in the middle of another; no token more than the text."""
        if not isinstance(text, str):
            raise TypeError("a text is expected")  # asked with bytes, to learn whether they are taken
        want = text.encode()
        for start in ("", _MARK):  # a space that some tokenizers put in front is cut off, with what stands for the mark
            ids = self._tokenizer.encode(start + text, add_special_tokens=False)
            for skip in range(min(4, len(ids) + 1)):
                if b"".join(self.tokens[i] for i in ids[skip:]) == want:
                    return ids[skip:]
        return self._greedy(want)

    def _greedy(self, want: bytes) -> list[int]:
        ids, at = [], 0
        while at < len(want):
            sizes = range(min(self._longest, len(want) - at), 0, -1)
            size = next((size for size in sizes if want[at : at + size] in self._ids), 0)
            if not size:
                break
            ids.append(self._ids[want[at : at + size]])
            at += size
        return ids
