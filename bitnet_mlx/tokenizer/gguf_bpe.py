"""A GGUF vocabulary of the kind "gpt2" (byte-level BPE) as a tokenizer.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

# How text is cut before merges, as the models' own tokenizer.json files have it.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST


@dataclass(frozen=True)
class Split:
    """pattern: a regular expression, None for GPT-2's own. whole: whether a word that is a token is taken unmerged.

    nfc: whether text is normalised first. bos: whether a BOS is put in front where the file does not say.
    """

    pattern: str | None
    whole: bool = False
    nfc: bool = False
    bos: bool = False


_LLAMA3 = Split(LLAMA3, whole=True, bos=True)
SPLITS = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon_e"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), Split(QWEN2, nfc=True)),
    **dict.fromkeys(("gpt-2", "gpt2", "olmo"), Split(None)),
}


def tokenizer_json(
    tokens: list[str], merges: list[str], added: dict[int, bool], split: Split, start: int | None, end: int | None
) -> str:
    """The file's text. added: ids of the tokens that are matched whole, and whether each is special.

    start, end: ids that are put around a text. Of tokens of one text the first id counts.
    """
    vocabulary: dict[str, int] = {}
    for number, token in enumerate(tokens):
        vocabulary.setdefault(token, number)
    pre: list[dict[str, Any]] = []
    if split.pattern is not None:
        pre.append({"type": "Split", "pattern": {"Regex": split.pattern}, "behavior": "Isolated", "invert": False})
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    pre.append({**level, "use_regex": split.pattern is None})
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [_added(number, tokens[number], special) for number, special in sorted(added.items())],
            "normalizer": {"type": "NFC"} if split.nfc else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre},
            "post_processor": _around(tokens, start, end),
            "decoder": {**level, "use_regex": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": split.whole,
                "vocab": vocabulary,
                "merges": [merge.split(" ", 1) for merge in merges],
            },
        },
        ensure_ascii=False,
    )


def _added(number: int, text: str, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": text, **flags, "special": special}


def _around(tokens: list[str], start: int | None, end: int | None) -> dict[str, Any] | None:
    if start is None and end is None:
        return None

    def special(number: int | None, kind: int) -> list[dict[str, Any]]:
        return [] if number is None else [{"SpecialToken": {"id": tokens[number], "type_id": kind}}]

    def text(name: str, kind: int) -> list[dict[str, Any]]:
        return [*special(start, kind), {"Sequence": {"id": name, "type_id": kind}}, *special(end, kind)]

    used = {tokens[number]: number for number in (start, end) if number is not None}
    return {
        "type": "TemplateProcessing",
        "single": text("A", 0),
        "pair": [*text("A", 0), *text("B", 1)],
        "special_tokens": {name: {"id": name, "ids": [number], "tokens": [name]} for name, number in used.items()},
    }
