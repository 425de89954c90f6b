"""Text files as token ids, with the bytes that their tokens stand for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bitnet_mlx.errors import ConfigError, FormatError
from bitnet_mlx.tokenizer import Tokenizer


class Text(NamedTuple):
    """ids [tokens]; nbytes of UTF-8 text that all but the first of them stand for."""

    name: str
    ids: Sequence[int]
    nbytes: int


def read_text(path: Path, tokenizer: Tokenizer, limit: int | None = None) -> Text:
    """One file. limit: score no more than its first tokens. Raises ConfigError or FormatError."""
    try:
        text = path.read_bytes().decode("utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError(f"[data] no file {path}; --data takes text files") from None
    except UnicodeDecodeError as error:
        raise FormatError(f"[data] {path} is not UTF-8 ({error.reason} at byte {error.start}); convert it") from error
    ids = tokenizer.encode(text)
    if len(ids) < 2:
        raise ConfigError(f"[data] {path} has {len(ids)} tokens; at least 2 are needed")
    if limit is not None and len(ids) > limit + 1:
        return part(str(path), ids[: limit + 1], tokenizer)
    return Text(str(path), ids, len(text.encode()) - _bytes(tokenizer, ids[0]))


def part(name: str, ids: Sequence[int], tokenizer: Tokenizer) -> Text:
    """Some tokens of a text."""
    return Text(name, ids, sum(_bytes(tokenizer, i) for i in ids[1:]))


def check_same(tokenizer: Tokenizer, teacher: Tokenizer, text: Text) -> None:
    """Raises ConfigError unless the teacher's tokenizer gives the text's tokens the same meaning."""
    for token in sorted(set(text.ids)):
        if tokenizer.id_to_token(token) != teacher.id_to_token(token):
            raise ConfigError(
                f"[data] token {token} is {tokenizer.id_to_token(token)!r} to the model and "
                f"{teacher.id_to_token(token)!r} to the teacher; a teacher of the same vocabulary is needed"
            )


def _bytes(tokenizer: Tokenizer, token: int) -> int:
    if token in tokenizer.special_ids:
        return 0
    piece = tokenizer.pieces[token]
    return len(piece.encode() if isinstance(piece, str) else piece)
