"""Computed prompts and conversations as files: what was said, its ids, and the keys and values of its positions.

A safetensors file: "tokens" int64 [n], the arrays of models/cache_state.py for the first of them, and one JSON string under
"bitnet_mlx" in its metadata. It belongs to one model on one engine in one precision, and is refused elsewhere by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_mlx.checkpoint.safetensors_file import SafetensorsFile
from bitnet_mlx.checkpoint.safetensors_writer import Pending, pending, write_safetensors
from bitnet_mlx.errors import ConfigError, FormatError
from bitnet_mlx.formats.strict_json import parse_json
from bitnet_mlx.generation.api import conversation_ids, prompt_ids
from bitnet_mlx.models.cache_state import Stored, fingerprint, restore, tensors
from bitnet_mlx.models.decoder import Decoder
from bitnet_mlx.tokenizer import Tokenizer

_FORMAT = 1


@dataclass
class Said:
    """What a cache stands for. text: the beginning of a prompt or of a first message. messages: a conversation's, without
    the system prompt. raw: no chat template is used; then ids are the text, whatever `messages` tells of it.
    """

    text: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)
    system_prompt: str | None = None
    raw: bool = False

    def check(self, system_prompt: str | None, raw: bool) -> None:
        """Raises ConfigError where a run asks for another system prompt, or to leave a template out that was used here."""
        if system_prompt is not None and system_prompt != self.system_prompt:
            raise ConfigError(
                f"[prompt cache] the file was made with the system prompt {self.system_prompt!r} and another was given; "
                "leave --system-prompt out, or make the file anew"
            )
        if raw and not self.raw:
            raise ConfigError(
                "[prompt cache] the file was made with the chat template; leave --ignore-chat-template out, or make it anew"
            )


@dataclass
class SavedPrompt:
    """A file's contents. The cache holds the first cache.offset of the ids."""

    said: Said
    ids: list[int]
    cache: Any

    def next_ids(self, tokenizer: Tokenizer, prompt: str) -> list[int]:
        """Ids of what was said with `prompt` behind it: the same as without a file. Raises ConfigError as templates do."""
        said = self.said
        if said.raw and said.messages:
            return self.ids + tokenizer.encode(prompt, add_special_tokens=not self.ids)
        if not said.messages:
            return prompt_ids(tokenizer, said.text + prompt, said.system_prompt, said.raw)
        return conversation_ids(tokenizer, [*said.messages, {"role": "user", "content": prompt}], said.system_prompt)


def keep_shared(cache: Any, held: Sequence[int], ids: Sequence[int]) -> int:
    """Cut a cache that holds the first of `held` back to what begins `ids` too, at most all but their last; its positions."""
    most = max(min(cache.offset, len(held), len(ids) - 1), 0)
    shared = next((i for i in range(most) if held[i] != ids[i]), most)
    cache.trim(shared)
    return shared


def check_place(path: Path) -> None:
    """Raises ConfigError where no file can come to lie: renaming would put one in the place of a device, such as /dev/null."""
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"[prompt cache] {path} lies in a folder that is not there; make the folder first")
    if path.exists() and not path.is_file():
        raise ConfigError(f"[prompt cache] {path} is a folder or a device; give a name for a file")


def save_prompt(path: Path | str, decoder: Decoder, cache: Any, ids: Sequence[int], said: Said, model: str) -> int:
    """Write a file, whole or not at all; its size in bytes. model: the name that messages know it by.

    Raises ConfigError where the cache is empty or the folder is not there, OSError where it cannot be written.
    """
    path = Path(path)
    if not cache or not cache.offset:
        raise ConfigError(f"[prompt cache] nothing was said yet; there is nothing to write to {path}")
    check_place(path)
    about = {
        "format": _FORMAT, "model": model, **_belongs_to(decoder), "text": said.text, "messages": said.messages,
        "system_prompt": said.system_prompt, "raw": said.raw,
    }  # fmt: skip
    parts = [pending("tokens", np.asarray(ids, np.int64))]
    for name, get in tensors(decoder, cache):
        parts.append(_pending(name, get))
    return write_safetensors(path, parts, {"bitnet_mlx": json.dumps(about)})


def _pending(name: str, get: Callable[[], Stored]) -> Pending:
    """One layer's array at a time is made, when its turn comes."""
    array, kind = get()
    return Pending(name, kind, array.shape, lambda: [np.ascontiguousarray(get()[0])])


def load_prompt(path: Path | str, decoder: Decoder, model: str, max_positions: int | None = None) -> SavedPrompt:
    """Read a file for this decoder. model: its name, for messages. max_positions: of the cache; None is the context.

    Raises FormatError for a file that is damaged or another thing, ConfigError for one of another model, engine or
    precision, or longer than max_positions.
    """
    file = SafetensorsFile(path)
    if "bitnet_mlx" not in file.metadata or "tokens" not in file.tensors:
        raise FormatError(
            f"[prompt cache] {path} is no prompt cache of this package; cache-prompt and /save in chat write them"
        )
    about = parse_json(file.metadata["bitnet_mlx"], f"[prompt cache] {path}")
    if not isinstance(about, dict) or about.get("format") != _FORMAT:
        raise FormatError(f"[prompt cache] {path} has another form than this version writes; make it anew")
    _check_owner(path, about, decoder, model)
    said = _said(path, about)
    ids = [int(i) for i in file.array("tokens")]
    cache = decoder.make_cache(max_positions)
    filled = {info.shape[-2] if len(info.shape) > 2 else -1 for name, info in file.tensors.items() if name != "tokens"}
    if len(filled) != 1 or (offset := filled.pop()) < 1:
        raise FormatError(f"[prompt cache] {path} holds layers of different lengths, or none; make it anew")
    limit = decoder.config.max_position_embeddings if max_positions is None else max_positions
    if offset > limit:
        raise ConfigError(
            f"[prompt cache] {path} holds {offset} positions and the context {limit}; raise --max-kv-size"
        )
    vocabulary = decoder.config.vocab_size
    if offset > len(ids) or not all(0 <= i < vocabulary for i in ids):
        raise FormatError(f"[prompt cache] {path} holds {offset} positions for {len(ids)} tokens, or unknown tokens")
    try:
        restore(decoder, cache, lambda name: (file.array(name), file.tensors[name].dtype), offset)
    except (ValueError, IndexError) as error:
        raise FormatError(f"[prompt cache] {path} holds arrays of other shapes than this model's: {error}") from error
    return SavedPrompt(said, ids, cache)


def _belongs_to(decoder: Any) -> dict[str, Any]:
    return {
        "fingerprint": fingerprint(decoder), "backend": decoder.name, "dtype": getattr(decoder, "dtype", "float32"),
        "kv_bits": getattr(decoder, "kv_bits", None),
    }  # fmt: skip


def _check_owner(path: Path | str, about: dict[str, Any], decoder: Decoder, model: str) -> None:
    mine = _belongs_to(decoder)
    for name in ("backend", "dtype", "kv_bits"):
        if about.get(name) != mine[name]:
            raise ConfigError(
                f"[prompt cache] {path} was made with {name} {about.get(name)} and this is {mine[name]}; "
                "keys and values are not the same there: use the same options, or make the file anew"
            )
    if about.get("fingerprint") != mine["fingerprint"]:
        raise ConfigError(
            f"[prompt cache] {path} was made by the model {about.get('model')} (weights {about.get('fingerprint')}) and this "
            f"is {model} (weights {mine['fingerprint']}); use that model, or make the file anew"
        )


def _said(path: Path | str, about: dict[str, Any]) -> Said:
    messages, system = about.get("messages"), about.get("system_prompt")
    sound = isinstance(about.get("text"), str) and isinstance(about.get("raw"), bool)
    sound = sound and (system is None or isinstance(system, str)) and isinstance(messages, list)
    if not sound or not all(
        isinstance(m, dict)
        and set(m) - {"reasoning_content"} == {"role", "content"}
        and all(isinstance(v, str) for v in m.values())
        for m in messages or ()
    ):
        raise FormatError(f"[prompt cache] {path}: what was said is not told as this version tells it; make it anew")
    return Said(about["text"], messages or [], system, about["raw"])
