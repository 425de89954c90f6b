"""The tokenizer that a GGUF file's metadata holds, corrected where published files are known to be wrong.

microsoft's 2B model: its file names no pre-tokenizer, without which llama.cpp splits numbers wrongly, and has a chat
template of other words than the model was trained with ("Human: ... BITNETAssistant: "), after which it never stops.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bitnet_mlx.errors import FormatError, UnsupportedModelError
from bitnet_mlx.formats.strict_json import shown
from bitnet_mlx.tokenizer.gguf_bpe import SPLITS, Split, tokenizer_json
from bitnet_mlx.tokenizer.metadata import AddedToken, Metadata
from bitnet_mlx.tokenizer.sentencepiece_model import CONTROL, UNKNOWN, USER_DEFINED, model_bytes

_KEY, _WHOLE = "tokenizer.ggml.", "tokenizer.huggingface.json"
_NAMED = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # ours: the key's "<name>_token_id"
_ENDS = ("eos", "eot", "eom")
_WRONG_TEMPLATE = "BITNETAssistant"
# The words that microsoft/bitnet-b1.58-2B-4T was trained with.
_BITNET_TEMPLATE = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)


@dataclass(frozen=True)
class GgufTokenizer:
    """What a folder would hold. file: "tokenizer.json" or "tokenizer.model", whose content `make` gives.

    meta: what the JSON files beside it would say. notices: what is odd.
    """

    file: Literal["tokenizer.json", "tokenizer.model"]
    make: Callable[[], bytes]
    meta: Metadata
    notices: tuple[str, ...]


def read_vocabulary(metadata: dict[str, Any], path: Path) -> GgufTokenizer:
    """The tokenizer of a file with this metadata.

    Raises FormatError for lists that are missing or do not fit, UnsupportedModelError for kinds that are not read.
    """
    return _Reader(metadata, path).read()


def hf_files(found: GgufTokenizer) -> dict[str, bytes]:
    """The files of a Hugging Face folder that say the same: name -> content."""
    meta = found.meta
    templates: object = meta.templates.get("default")
    if set(meta.templates) - {"default"}:
        templates = [{"name": name, "template": text} for name, text in meta.templates.items()]
    fast = found.file == "tokenizer.json"
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast" if fast else "LlamaTokenizer",
        **meta.named,
        "add_bos_token": meta.add_bos,
        "add_eos_token": meta.add_eos,
        "legacy": meta.legacy,
        "added_tokens_decoder": {str(i): {"content": t.content, "special": t.special} for i, t in meta.added.items()},
        **({"chat_template": templates} if templates else {}),
    }
    return {
        found.file: found.make(),
        "tokenizer_config.json": json.dumps(settings, ensure_ascii=False, indent=2).encode(),
        "generation_config.json": json.dumps({"eos_token_id": list(meta.eos_ids)}).encode(),
    }


class _Reader:
    def __init__(self, metadata: dict[str, Any], path: Path) -> None:
        self.metadata, self.path = metadata, path
        self.notices: list[str] = []
        self.tokens: list[str] = self._list("tokens", str)
        count = len(self.tokens)
        if not count or self._get("model", str) is None:
            raise FormatError(
                f"[tokenizer] {path} holds no vocabulary ({_KEY}model and {_KEY}tokens), and none beside it is read; take a "
                "GGUF file that has one, or the model's Hugging Face folder or name"
            )
        self.kinds: list[int] = self._list("token_type", int, count) or [1] * count
        self.ids = {ours: self._id(f"{key}_token_id") for ours, key in _NAMED.items()}
        self.named = {name: self.tokens[number] for name, number in self.ids.items() if number is not None}

    def read(self) -> GgufTokenizer:
        if self.metadata.get(_WHOLE) is not None:
            return self._whole(self.metadata[_WHOLE])
        kind = self._get("model", str)
        if kind == "gpt2":
            return self._byte_level()
        if kind == "llama":
            return self._sentencepiece()
        raise UnsupportedModelError(
            f"[tokenizer] {self.path}: {_KEY}model is {shown(kind)}; gpt2 (byte-level BPE) and llama (sentencepiece) "
            "are supported"
        )

    def _whole(self, text: Any) -> GgufTokenizer:
        """tokenizer.huggingface.json, a key of the format's own: the model's tokenizer.json as it stands."""
        if not isinstance(text, str):
            raise FormatError(f"[tokenizer] {self.path}: {_WHOLE} is {shown(text)}; a text is needed")
        return GgufTokenizer("tokenizer.json", text.encode, self._meta(False, False, {}), tuple(self.notices))

    def _byte_level(self) -> GgufTokenizer:
        split = self._split()
        add_bos, add_eos = self._flag("add_bos_token", split.bos), self._flag("add_eos_token", False)
        added = {i: kind == CONTROL for i, kind in enumerate(self.kinds) if kind in (CONTROL, USER_DEFINED)}
        start, end = self.ids["bos"] if add_bos else None, self.ids["eos"] if add_eos else None
        meta = self._meta(add_bos, add_eos, {})

        def make() -> bytes:
            return tokenizer_json(self.tokens, self._merges(), added, split, start, end).encode()

        return GgufTokenizer("tokenizer.json", make, meta, tuple(self.notices))

    def _split(self) -> Split:
        name = self._get("pre", str)
        if name in (None, "default"):
            llama3 = {"<|begin_of_text|>", "<|eot_id|>"} <= set(self.tokens)
            name = "llama-bpe" if llama3 else "gpt-2"
            owner = "for Llama 3, whose vocabulary it has" if llama3 else "for GPT-2"
            self.notices.append(f"{_KEY}pre is missing; text is split as {owner}")
        if name == "falcon_e":
            self.notices.append("text is split as for falcon3; that falcon_e means the same was not verified")
        if name not in SPLITS:
            raise UnsupportedModelError(
                f"[tokenizer] {self.path}: {_KEY}pre is {shown(name)}; {', '.join(SPLITS)} are supported. Give a folder "
                "with the model's tokenizer.json"
            )
        return SPLITS[name]

    def _merges(self) -> list[str]:
        merges, known = self._list("merges", str), set(self.tokens)
        for merge in merges:
            left, space, right = merge.partition(" ")
            if not space or left not in known or right not in known or left + right not in known:
                raise self._wrong(
                    "merges", f"{shown(merge)} does not join two tokens into a third; the file is damaged"
                )
        return merges

    def _sentencepiece(self) -> GgufTokenizer:
        scores = self._list("scores", float, len(self.tokens))
        if not scores:
            raise self._wrong("scores", "a sentencepiece vocabulary needs a score for each token")
        if UNKNOWN not in self.kinds and self.ids["unk"] is not None:
            self.kinds[self.ids["unk"]] = UNKNOWN
        prefix, trim = self._flag("add_space_prefix", True), self._flag("remove_extra_whitespaces", False)

        def make() -> bytes:
            return model_bytes(self.tokens, scores, self.kinds, self.named, space_prefix=prefix, trim_spaces=trim)

        added = {i: AddedToken(self.tokens[i], special=True) for i, kind in enumerate(self.kinds) if kind == CONTROL}
        meta = self._meta(self._flag("add_bos_token", True), self._flag("add_eos_token", False), added)
        return GgufTokenizer("tokenizer.model", make, meta, tuple(self.notices))

    def _meta(self, add_bos: bool, add_eos: bool, added: dict[int, AddedToken]) -> Metadata:
        ends = [self._id(f"{name}_token_id") for name in _ENDS]
        return Metadata(
            folder=self.path,
            named={f"{name}_token": text for name, text in self.named.items()},
            added=added,
            templates=self._templates(),
            eos_ids=tuple(dict.fromkeys(i for i in ends if i is not None)),
            bos_id=self.ids["bos"],
            pad_id=self.ids["pad"],
            add_bos=add_bos,
            add_eos=add_eos,
            # llama.cpp puts a space in front of each stretch of text between special tokens.
            legacy=True,
        )

    def _templates(self) -> dict[str, str]:
        templates: dict[str, str] = {}
        for key, value in self.metadata.items():
            if key == "tokenizer.chat_template" or key.startswith("tokenizer.chat_template."):
                if not isinstance(value, str):
                    raise FormatError(f"[tokenizer] {self.path}: {key} is {shown(value)}; a text is needed")
                if value.strip():
                    templates[key.removeprefix("tokenizer.chat_template").lstrip(".") or "default"] = value
        if _WRONG_TEMPLATE in templates.get("default", ""):
            templates["default"] = _BITNET_TEMPLATE
            self.notices.append(
                f"its chat template ({_WRONG_TEMPLATE}) is not the one that the model was trained with; "
                "that of the model's own repository is used"
            )
        return templates

    def _wrong(self, key: str, text: str) -> FormatError:
        return FormatError(f"[tokenizer] {self.path}: {_KEY}{key}: {text}")

    def _get(self, key: str, kind: type) -> Any:
        value = self.metadata.get(_KEY + key)
        if value is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise self._wrong(key, f"it is {shown(value)}; a value of type {kind.__name__} is needed")
        return value

    def _flag(self, key: str, default: bool) -> bool:
        value = self._get(key, bool)
        return default if value is None else value

    def _id(self, key: str) -> int | None:
        """A token id; one that no token has counts as none, as -1 and 2^32 - 1 do."""
        value = self._get(key, int)
        return value if value is not None and 0 <= value < len(self.tokens) else None

    def _list(self, key: str, kind: type, count: int | None = None) -> list[Any]:
        """A list of one type; empty where it is missing. count: how long it must be where it is there."""
        values = self._get(key, list) or []
        if not all(type(value) is kind for value in values):
            raise self._wrong(key, f"it holds a value that is no {kind.__name__}; the file is damaged")
        if values and count is not None and len(values) != count:
            raise self._wrong(key, f"it has {len(values)} entries for {count} tokens; the file is damaged")
        return values
