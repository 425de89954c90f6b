"""The libraries that split text, imported late: `tokenizers` for tokenizer.json, `sentencepiece` for .model files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Protocol

from bitnet_mlx.errors import ConfigError, FormatError
from bitnet_mlx.formats.git_lfs import refuse_pointer
from bitnet_mlx.tokenizer.metadata import AddedToken, Metadata
from bitnet_mlx.tokenizer.pieces import SPACE, Leading, Pieces, fallback_byte, pieces_from_decoder

# A protobuf message may be followed by another of the same type, which is merged into it. This one says
# normalizer_spec { add_dummy_prefix: false } (fields 3 and 3 of sentencepiece_model.proto).
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class Engine(Protocol):
    """One loaded vocabulary. `named` is metadata's, completed by what the model file knows."""

    named: dict[str, str]
    pieces: Pieces
    special_ids: frozenset[int]
    vocab_size: int

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...
    def token_to_id(self, token: str) -> int | None: ...
    def id_to_token(self, token: int) -> str | None: ...


class JsonEngine:
    """tokenizer.json: its post-processor decides which special tokens are added, whatever add_bos_token says (as in
    transformers 5). Added tokens that only tokenizer_config.json knows are added.
    """

    def __init__(self, path: Path, meta: Metadata, data: bytes | None = None) -> None:
        """data: the file's content, where it lies in no file of its own."""
        try:
            import tokenizers
        except ImportError as error:
            raise _missing("tokenizers", path) from error
        try:
            load = tokenizers.Tokenizer
            self._tokenizer = load.from_file(str(path)) if data is None else load.from_buffer(data)
        except Exception as error:  # the library raises nothing narrower
            refuse_pointer(path, "tokenizer")
            raise FormatError(f"[tokenizer] {path} cannot be read: {error}; download the file again") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.named = dict(meta.named)
        self._add_tokens(path, meta)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(number for number, token in added.items() if token.special)
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        decoder = self._tokenizer.decoder
        state: dict[str, Any] | None = None if decoder is None else json.loads(decoder.__getstate__())
        self.pieces = pieces_from_decoder(state, self.id_to_token)

    def _add_tokens(self, path: Path, meta: Metadata) -> None:
        from tokenizers import AddedToken as Added

        known = self._tokenizer.get_added_tokens_decoder()
        for number, token in sorted(meta.added.items()):
            if number in known and known[number].content == token.content:
                continue
            flags = {
                name: getattr(token, name) for name in ("special", "lstrip", "rstrip", "single_word", "normalized")
            }
            self._tokenizer.add_tokens([Added(token.content, **flags)])
            if self._tokenizer.token_to_id(token.content) != number:
                raise FormatError(
                    f"[tokenizer] tokenizer_config.json gives {token.content!r} the id {number}, but with {path} it is "
                    f"{self._tokenizer.token_to_id(token.content)}; the files are not of one model: download both again"
                )
        present = [text for text in meta.named.values() if self._tokenizer.token_to_id(text) is not None]
        if present:
            self._tokenizer.add_special_tokens(present)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def token_to_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def id_to_token(self, token: int) -> str | None:
        return self._tokenizer.id_to_token(token) if token >= 0 else None


class SentencePieceEngine:
    """tokenizer.model or spiece.model, split by sentencepiece itself; special tokens are cut out of the text first.

    With `legacy` (tokenizer_config.json) each stretch of text between special tokens gets sentencepiece's leading
    space; without it, only the start of the text does.
    """

    def __init__(self, path: Path, meta: Metadata, data: bytes | None = None) -> None:
        """data: the file's content, where it lies in no file of its own."""
        try:
            import sentencepiece
        except ImportError as error:
            raise _missing("sentencepiece", path) from error
        data = path.read_bytes() if data is None else data
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
            self._inner = self._model
            if not meta.legacy:
                self._inner = sentencepiece.SentencePieceProcessor(model_proto=data + _NO_DUMMY_PREFIX)
        except RuntimeError as error:
            refuse_pointer(path, "tokenizer")
            raise FormatError(
                f"[tokenizer] {path} is not a sentencepiece model ({error}); a tiktoken file of the same name is not "
                "supported: use a folder with tokenizer.json"
            ) from error
        model = self._model
        self.named = dict(meta.named)
        for name, number in (
            ("bos_token", model.bos_id()),
            ("eos_token", model.eos_id()),
            ("unk_token", model.unk_id()),
        ):
            if number >= 0:
                self.named.setdefault(name, model.id_to_piece(number))
        self._size = model.get_piece_size()
        self._added, self._matcher = self._special_tokens(meta)
        self._text_of = {number: token.content for number, token in self._added.items()}
        self._id_of = {text: number for number, text in self._text_of.items()}
        self.vocab_size = max([self._size - 1, *self._added]) + 1
        control = (i for i in range(self._size) if model.is_control(i) or model.is_unknown(i))
        self.special_ids = frozenset(control) | {i for i, token in self._added.items() if token.special}
        self.pieces = Pieces(self._piece, self._leading(), per_byte=True)
        add_bos = meta.add_bos if meta.add_bos is not None else path.name == "tokenizer.model"
        self._bos = self._end(add_bos, "bos_token")
        self._eos = self._end(bool(meta.add_eos), "eos_token")

    def _special_tokens(self, meta: Metadata) -> tuple[dict[int, AddedToken], re.Pattern[str] | None]:
        """What is matched before sentencepiece sees the text: added and named tokens, the longest first."""
        added = dict(meta.added)
        for text in self.named.values():
            number = self._model.piece_to_id(text)
            if number not in added and self._model.id_to_piece(number) == text:
                added[number] = AddedToken(text, special=True)
        tokens = sorted(added.values(), key=lambda token: -len(token.content))
        if not tokens:
            return added, None
        parts = [
            (r"\s*" if t.lstrip else "") + "(" + re.escape(t.content) + ")" + (r"\s*" if t.rstrip else "")
            for t in tokens
        ]
        return added, re.compile("|".join(parts))

    def _leading(self) -> Leading:
        """Which leading spaces of a decoded text are sentencepiece's own, found by trying."""
        if self._model.encode("a  a") == self._model.encode("a a"):
            return "pieces"  # remove_extra_whitespaces
        return "piece" if self._model.encode("a", out_type=str)[0].startswith(SPACE) else "keep"

    def _end(self, wanted: bool, name: str) -> list[int]:
        number = self.token_to_id(self.named[name]) if wanted and name in self.named else None
        return [] if number is None else [number]

    def _piece(self, token: int) -> str | bytes:
        if token in self._text_of:
            return self._text_of[token]
        if not 0 <= token < self._size:
            return ""
        text = self._model.id_to_piece(token)
        byte = fallback_byte(text) if self._model.is_byte(token) else None
        return text.replace(SPACE, " ") if byte is None else bytes([byte])

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids = list(self._bos) if add_special_tokens else []
        at = 0
        for match in self._matcher.finditer(text) if self._matcher else ():
            ids += self._plain(text[at : match.start()], at)
            ids.append(self._id_of[match.group(match.lastindex or 0)])
            at = match.end()
        ids += self._plain(text[at:], at)
        return ids + self._eos if add_special_tokens else ids

    def _plain(self, text: str, at: int) -> list[int]:
        if not text:
            return []
        # Where sentencepiece drops leading spaces, its own prefix stands for the one that was written.
        written = text[0] == " " and self.pieces.leading == "pieces"
        return list((self._model if at == 0 or written else self._inner).encode(text))

    def token_to_id(self, token: str) -> int | None:
        if token in self._id_of:
            return self._id_of[token]
        number = self._model.piece_to_id(token)
        return number if self._model.id_to_piece(number) == token else None

    def id_to_token(self, token: int) -> str | None:
        if token in self._text_of:
            return self._text_of[token]
        return self._model.id_to_piece(token) if 0 <= token < self._size else None


def _missing(package: str, path: Path) -> ConfigError:
    return ConfigError(
        f"[tokenizer] {path} needs the package {package}, which is not installed; run: pip install {package}"
    )
