"""A folder's tokenizer as the metadata of a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bitnet_mlx.errors import UnsupportedModelError
from bitnet_mlx.tokenizer.gguf_bpe import SPLITS
from bitnet_mlx.tokenizer.metadata import Metadata, read_metadata
from bitnet_mlx.tokenizer.sentencepiece_model import BYTE, CONTROL, UNKNOWN, USER_DEFINED

_KEY = "tokenizer.ggml."
_NORMAL, _UNUSED = 1, 5
_NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def vocabulary(folder: Path, vocab_size: int, eos_ids: tuple[int, ...], notices: list[str]) -> dict[str, Any]:
    """Keys of the tokenizer of a folder.

    vocab_size: rows of the embedding, to which the list of tokens is filled up or cut. eos_ids: the model's own stop
    tokens. notices: gets what a user should know. Raises UnsupportedModelError for tokenizers that the format cannot tell.
    """
    meta = read_metadata(folder)
    if (folder / "tokenizer.json").is_file() and not (folder / "tokenizer.model").is_file():
        keys = _byte_level(folder / "tokenizer.json", meta, notices)
    elif (folder / "tokenizer.model").is_file():
        keys = _sentencepiece(folder / "tokenizer.model", meta)
    else:
        raise UnsupportedModelError(
            f"[convert] {folder} has no tokenizer.json and no tokenizer.model; a GGUF file holds its tokenizer, so one is "
            "needed: copy it from the model that the weights were made from"
        )
    _fit(keys, vocab_size, notices)
    return {**keys, **_ids(keys, meta, eos_ids), **_templates(meta)}


def _byte_level(path: Path, meta: Metadata, notices: list[str]) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    state = json.loads(text)
    model = state.get("model") or {}
    parts = _parts(state.get("pre_tokenizer"))
    if model.get("type") != "BPE" or not any(part.get("type") == "ByteLevel" for part in parts):
        raise UnsupportedModelError(
            f"[convert] {path} is no byte-level BPE, the one kind of tokenizer.json that is written to GGUF; a "
            "tokenizer.model beside it would be"
        )
    added = {token["id"]: token for token in state.get("added_tokens", [])}
    ids = {**model["vocab"], **{token["content"]: number for number, token in added.items()}}
    tokens = {number: token for token, number in ids.items()}
    kinds = {number: CONTROL if token.get("special") else USER_DEFINED for number, token in added.items()}
    keys: dict[str, Any] = {
        f"{_KEY}model": "gpt2",
        f"{_KEY}pre": _pre(parts, bool(model.get("ignore_merges"))),
        f"{_KEY}tokens": [tokens.get(i, f"[PAD{i}]") for i in range(max(tokens) + 1)],
        f"{_KEY}token_type": [kinds.get(i, _NORMAL if i in tokens else _UNUSED) for i in range(max(tokens) + 1)],
        f"{_KEY}merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
        f"{_KEY}add_bos_token": _starts_with_bos(state.get("post_processor"), meta.named.get("bos_token")),
    }
    if keys[f"{_KEY}pre"] == "default":
        keys["tokenizer.huggingface.json"] = text
        notices.append(
            "how this tokenizer cuts text has no name in GGUF that is known here; tokenizer.json is included whole, and "
            "readers that do not use it may split text otherwise"
        )
    return keys


def _parts(pre: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre is None:
        return []
    return pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]


def _pre(parts: list[dict[str, Any]], whole: bool) -> str:
    """The format's name for how text is cut, or "default"."""
    patterns = [part["pattern"].get("Regex") for part in parts if part.get("type") == "Split"]
    others = [part for part in parts if part.get("type") not in ("Split", "ByteLevel")]
    if others or len(patterns) > 1 or any(part.get("add_prefix_space") for part in parts):
        return "default"
    pattern = patterns[0] if patterns else None
    for name in ("llama-bpe", "qwen2", "gpt-2"):
        if SPLITS[name].pattern == pattern and SPLITS[name].whole == whole:
            return name
    return "default"


def _starts_with_bos(post: dict[str, Any] | None, bos: str | None) -> bool:
    """Whether the post-processor puts a BOS before a text."""
    for part in (post or {}).get("processors") or [post or {}]:
        single = part.get("single") or []
        if single and bos is not None and single[0].get("SpecialToken", {}).get("id") == bos:
            return True
    return False


def _sentencepiece(path: Path, meta: Metadata) -> dict[str, Any]:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tests = (
        (model.is_unknown, UNKNOWN),
        (model.is_control, CONTROL),
        (model.is_unused, _UNUSED),
        (model.is_byte, BYTE),
    )
    count = model.get_piece_size()
    tokens = [model.id_to_piece(i) for i in range(count)]
    scores = [float(model.get_score(i)) for i in range(count)]
    kinds = [next((kind for test, kind in tests if test(i)), _NORMAL) for i in range(count)]
    for number, token in sorted(meta.added.items()):
        while len(tokens) <= number:
            tokens.append(f"[PAD{len(tokens)}]")
            scores.append(-1000.0)
            kinds.append(_UNUSED)
        if number >= count or token.special:
            tokens[number] = token.content
            kinds[number] = CONTROL if token.special and kinds[number] != UNKNOWN else kinds[number]
            if number >= count and not token.special:
                kinds[number] = USER_DEFINED
    return {
        f"{_KEY}model": "llama",
        f"{_KEY}pre": "default",
        f"{_KEY}tokens": tokens,
        f"{_KEY}scores": scores,
        f"{_KEY}token_type": kinds,
        f"{_KEY}add_bos_token": meta.add_bos is not False,
        f"{_KEY}add_eos_token": meta.add_eos is True,
        f"{_KEY}add_space_prefix": bool(model.encode("a", out_type=str)[0].startswith("\u2581")),
        f"{_KEY}remove_extra_whitespaces": model.encode("a  b") == model.encode("a b"),
    }


def _fit(keys: dict[str, Any], vocab_size: int, notices: list[str]) -> None:
    """As many tokens as the embedding has rows, which llama.cpp wants."""
    tokens = keys[f"{_KEY}tokens"]
    count = len(tokens)
    if count > vocab_size:
        notices.append(f"the tokenizer has {count} tokens and the embedding {vocab_size} rows; the rest is left out")
    fill = [f"[PAD{i}]" for i in range(count, vocab_size)]
    for name, filling in (
        ("tokens", fill),
        ("token_type", [_UNUSED] * len(fill)),
        ("scores", [-1000.0] * len(fill)),
    ):
        if f"{_KEY}{name}" in keys:
            keys[f"{_KEY}{name}"] = (keys[f"{_KEY}{name}"] + filling)[:vocab_size]
    if count > vocab_size and f"{_KEY}merges" in keys:
        known = set(keys[f"{_KEY}tokens"])
        keys[f"{_KEY}merges"] = [m for m in keys[f"{_KEY}merges"] if m.replace(" ", "", 1) in known]


def _ids(keys: dict[str, Any], meta: Metadata, eos_ids: tuple[int, ...]) -> dict[str, Any]:
    """Ids of the named tokens; a second stop token is the end of a turn."""
    numbers = {token: number for number, token in enumerate(keys[f"{_KEY}tokens"])}
    found = {
        f"{_KEY}{key}_token_id": numbers[meta.named[name]]
        for name, key in _NAMED.items()
        if meta.named.get(name) in numbers
    }
    if f"{_KEY}bos_token_id" not in found and meta.bos_id is not None:
        found[f"{_KEY}bos_token_id"] = meta.bos_id
    for number in dict.fromkeys((*eos_ids, *meta.eos_ids)):
        for key in ("eos", "eot", "eom"):
            if found.setdefault(f"{_KEY}{key}_token_id", number) == number:
                break
    return found


def _templates(meta: Metadata) -> dict[str, Any]:
    others = [name for name in meta.templates if name != "default"]
    keys: dict[str, Any] = {"tokenizer.chat_templates": others} if others else {}
    for name, template in meta.templates.items():
        keys["tokenizer.chat_template" + ("" if name == "default" else f".{name}")] = template
    return keys
