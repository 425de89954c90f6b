"""Samples from JSONL files in mlx-lm's formats, one JSON object a line:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}    (and "tools")
    {"prompt": "...", "completion": "..."}
    {"text": "..."}

A file holds one of them. Completions go through the model's chat template as a user's and an assistant's turn; a base
model, which has none, gets the two texts one after the other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bitnet_mlx.errors import BitnetError, ConfigError, FormatError
from bitnet_mlx.tokenizer import Tokenizer

LONG = ("truncate", "drop")
_FORMATS = (("prompt", "completion"), ("messages",), ("text",))


class Sample(NamedTuple):
    """ids: int32 [tokens]; those from `offset` on (and from 1 on) are what the model learns to predict."""

    ids: np.ndarray
    offset: int


@dataclass
class Samples:
    """What a file gave. long: how many were longer than the window. dropped: left out, for length or nothing to learn."""

    items: list[Sample] = field(default_factory=list)
    long: int = 0
    dropped: int = 0

    def facts(self, name: str) -> dict[str, int]:
        """Counts, for a record."""
        tokens = sum(len(item.ids) for item in self.items)
        return {
            f"{name}_samples": len(self.items), f"{name}_tokens": tokens, f"{name}_long": self.long,
            f"{name}_dropped": self.dropped,
        }  # fmt: skip

    def digest(self) -> str:
        """What tells these samples from others: a run goes on only over the same."""
        total = hashlib.sha256()
        for ids, offset in self.items:
            total.update(f"{len(ids)} {offset} ".encode())
            total.update(ids.tobytes())
        return total.hexdigest()


def read_samples(path: Path, tokenizer: Tokenizer, window: int, mask_prompt: bool, long: str = "truncate") -> Samples:
    """The samples of one file, at most `window` tokens each. long: "truncate" or "drop" those that have more.

    Raises ConfigError where the file is missing or a prompt cannot be masked, FormatError with the line's number where
    a line is malformed, and where nothing is left to learn from.
    """
    found = Samples()
    keys: tuple[str, ...] | None = None
    for number, entry in _entries(path):
        where = f"{path}, line {number}"
        keys = keys or _format(entry, where)
        _check(entry, keys, where)
        if mask_prompt and keys == ("text",):
            raise ConfigError(f"[lora] {path} holds plain text, which has no prompt; leave out --mask-prompt")
        try:
            ids, offset = _encode(entry, keys, tokenizer, mask_prompt)
        except BitnetError as error:
            raise type(error)(f"{error} ({where})") from error
        if len(ids) > window:
            found.long += 1
            ids = ids[:window] if long == "truncate" else []
        if len(ids) <= max(offset, 1):
            found.dropped += 1
        else:
            found.items.append(Sample(np.asarray(ids, np.int32), offset))
    if not found.items:
        why = f"all {found.dropped} samples were dropped as too long or too short" if found.dropped else "it is empty"
        raise FormatError(
            f"[lora] {path} gives nothing to learn from: {why}; give samples, or a larger --max-seq-length"
        )
    return found


def _entries(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number and the object of each line that is not blank."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise ConfigError(
            f"[lora] no file {path}; --data is a folder with train.jsonl and, if wanted, valid.jsonl"
        ) from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise FormatError(
                f"[lora] {path}, line {number} is no JSON: {error}; one object a line is needed"
            ) from error
        if not isinstance(entry, dict):
            raise FormatError(f"[lora] {path}, line {number} is a {type(entry).__name__}; a JSON object is needed")
        yield number, entry


def _format(entry: dict[str, Any], where: str) -> tuple[str, ...]:
    for keys in _FORMATS:
        if all(key in entry for key in keys):
            return keys
    raise FormatError(
        f"[lora] {where} has the keys {', '.join(sorted(entry)) or 'none'}; messages, prompt and completion, or text are needed"
    )


def _check(entry: dict[str, Any], keys: tuple[str, ...], where: str) -> None:
    for key in keys:
        value = entry.get(key)
        if key == "messages":
            good = isinstance(value, list) and value and all(isinstance(m, dict) and "role" in m for m in value)
            needed = "a list of messages, each with a role and a content"
        else:
            good, needed = isinstance(value, str), "a text, as in the lines before"
        if not good:
            raise FormatError(f"[lora] {where}: {key} is {str(value)[:40]!r}; {needed} is needed")


def _encode(
    entry: dict[str, Any], keys: tuple[str, ...], tokenizer: Tokenizer, mask_prompt: bool
) -> tuple[Sequence[int], int]:
    """Ids, and how many of them are the prompt (0 unless it is masked)."""
    if keys == ("text",):
        return _ended(tokenizer, tokenizer.encode(entry["text"])), 0
    if keys == ("messages",):
        return _conversation(tokenizer, entry["messages"], entry.get("tools"), mask_prompt)
    prompt, completion = entry["prompt"], entry["completion"]
    if tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return _conversation(tokenizer, turns, entry.get("tools"), mask_prompt)
    before = tokenizer.encode(prompt)
    ids = _ended(tokenizer, [*before, *tokenizer.encode(completion, add_special_tokens=False)])
    return ids, len(before) if mask_prompt else 0


def _ended(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """The ids of a text with the token that ends it."""
    end = tokenizer.eos_token_id
    return ids if end is None or (ids and ids[-1] == end) else [*ids, end]


def _conversation(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], tools: Any, mask_prompt: bool
) -> tuple[Sequence[int], int]:
    extra = {} if tools is None else {"tools": tools}
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=False, **extra)
    if not mask_prompt or len(messages) < 2:
        return ids, 0
    answers = messages[-1].get("role") == "assistant"
    return ids, len(tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=answers, **extra))
