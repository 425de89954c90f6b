"""A tokenizer's folder as the metadata that converters put into a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def from_json(folder: Path, pre: str | None = "gpt-2", **changes: Any) -> dict[str, Any]:
    """tokenizer.json (byte-level BPE)."""
    state = json.loads((folder / "tokenizer.json").read_text())
    ids = dict(state["model"]["vocab"]) | {token["content"]: token["id"] for token in state["added_tokens"]}
    kinds = {token["id"]: 3 if token["special"] else 4 for token in state["added_tokens"]}
    tokens = sorted(ids, key=lambda text: ids[text])
    merges = [m if isinstance(m, str) else " ".join(m) for m in state["model"]["merges"]]
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [kinds.get(i, 1) for i in range(len(tokens))],
        "tokenizer.ggml.merges": merges,
    }
    if pre is not None:
        keys["tokenizer.ggml.pre"] = pre
    return keys | _named(folder, ids) | changes


def from_sentencepiece(folder: Path, **changes: Any) -> dict[str, Any]:
    """tokenizer.model, with the numbers that sentencepiece itself gives."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    count = model.get_piece_size()

    def kind(i: int) -> int:
        tests = (model.is_unknown, model.is_control, lambda _: False, model.is_unused, model.is_byte)
        return next((number for number, test in enumerate(tests, 2) if test(i)), 1)

    tokens = [model.id_to_piece(i) for i in range(count)]
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [float(model.get_score(i)) for i in range(count)],
        "tokenizer.ggml.token_type": [kind(i) for i in range(count)],
    }
    return keys | _named(folder, {token: i for i, token in enumerate(tokens)}) | changes


def _named(folder: Path, ids: dict[str, int]) -> dict[str, Any]:
    """Ids of the named tokens, and the chat template, of tokenizer_config.json."""
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    keys: dict[str, Any] = {
        f"tokenizer.ggml.{key}_token_id": ids[settings[name]]
        for name, key in _NAMES.items()
        if settings.get(name) in ids
    }
    if settings.get("chat_template"):
        keys["tokenizer.chat_template"] = settings["chat_template"]
    return keys
