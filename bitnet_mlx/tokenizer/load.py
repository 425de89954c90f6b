"""Tokenizer: the one class that the rest of the package sees, and how a folder becomes one."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitnet_mlx.errors import ConfigError, FormatError
from bitnet_mlx.tokenizer import chat
from bitnet_mlx.tokenizer.detokenize import Detokenizer
from bitnet_mlx.tokenizer.engines import Engine, JsonEngine, SentencePieceEngine
from bitnet_mlx.tokenizer.gguf import read_vocabulary
from bitnet_mlx.tokenizer.metadata import Metadata, read_metadata
from bitnet_mlx.tokenizer.pieces import Pieces

if TYPE_CHECKING:
    from bitnet_mlx.checkpoint.gguf_file import GgufFile

log = logging.getLogger(__name__)

_SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model")


def load_tokenizer(folder: str | Path | GgufFile) -> Tokenizer:
    """The tokenizer of a model folder (tokenizer.json, else tokenizer.model or spiece.model), or of a GGUF file.

    An open file's metadata is not parsed again.

    Raises FormatError when none is there or a file is damaged, UnsupportedModelError for an unknown kind of decoder,
    ConfigError when the library that reads the file is not installed.
    """
    given, folder = folder, Path(folder)
    if folder.is_file():
        return _from_gguf(given)
    meta = read_metadata(folder)
    path = folder / "tokenizer.json"
    if path.is_file():
        return Tokenizer(JsonEngine(path, meta), meta)
    for name in _SENTENCEPIECE_FILES:
        if (folder / name).is_file():
            return Tokenizer(SentencePieceEngine(folder / name, meta), meta)
    raise FormatError(
        f"[tokenizer] {folder} has no tokenizer; one of tokenizer.json, {', '.join(_SENTENCEPIECE_FILES)} is needed: "
        "copy it from the model that the weights were made from"
    )


def _from_gguf(source: str | Path | GgufFile) -> Tokenizer:
    from bitnet_mlx.checkpoint.gguf_file import opened

    file = opened(source)
    path, found = file.path, read_vocabulary(file.metadata, file.path)
    for notice in found.notices:
        log.warning("%s: %s", path, notice)
    engine = JsonEngine if found.file == "tokenizer.json" else SentencePieceEngine
    tokenizer = Tokenizer(engine(path, found.meta, found.make()), found.meta)
    tokenizer.gguf_pooling = file.metadata.get(f"{file.metadata.get('general.architecture')}.pooling_type")
    return tokenizer


class Tokenizer:
    """Text to ids and back, chat templates, and the ids that end a text.

    eos_token_ids unites config.json, generation_config.json, tokenizer_config.json, special_tokens_map.json, the
    sentencepiece model, and the end-of-turn tokens that the chat template writes.
    """

    def __repr__(self) -> str:
        template = "a chat template" if self.chat_template else "no chat template"
        return f"Tokenizer({self.name_or_path}, {self.vocab_size} tokens, {template})"

    def __init__(self, engine: Engine, meta: Metadata) -> None:
        self._engine = engine
        self.name_or_path = str(meta.folder)
        self.gguf_pooling: int | None = None  # what a GGUF file says of embeddings, by llama.cpp's numbers
        self.generation_config: dict[str, Any] = dict(meta.generation_config)
        self.special_tokens: dict[str, str] = dict(engine.named)
        self.vocab_size: int = engine.vocab_size  # with added tokens
        self.special_ids: frozenset[int] = engine.special_ids
        self.pieces: Pieces = engine.pieces
        self.pad_token_id = self._named_id("pad_token", meta.pad_id)
        self.eos_token_ids = self._all_eos(meta)
        start = engine.encode("", True)
        self.bos_token_id = self._named_id("bos_token", meta.bos_id)
        if self.bos_token_id is None and start and start[0] not in self.eos_token_ids:
            self.bos_token_id = start[0]
        self.adds_bos: bool = bool(start) and start[0] == self.bos_token_id
        self._templates = dict(meta.templates)

    def _named_id(self, name: str, stated: int | None) -> int | None:
        """The id of a named token, else the one that config.json states, if the vocabulary has it."""
        if name in self.special_tokens:
            return self.token_to_id(self.special_tokens[name])
        return stated if stated is not None and self.id_to_token(stated) is not None else None

    def _all_eos(self, meta: Metadata) -> frozenset[int]:
        texts = {self.special_tokens["eos_token"]} if "eos_token" in self.special_tokens else set()
        texts |= {t for t in chat.END_OF_TURN if any(t in template for template in meta.templates.values())}
        ids = {self.token_to_id(text) for text in texts}
        return frozenset(i for i in ids if i is not None) | frozenset(meta.eos_ids)

    @property
    def eos_token_id(self) -> int | None:
        """The id of eos_token alone (what a text in training ends with); generation stops at any of eos_token_ids."""
        return self._named_id("eos_token", min(self.eos_token_ids, default=None))

    @property
    def chat_template(self) -> str | None:
        """The template's source, or None for a base model."""
        return chat.select_template(self._templates, tools=False)

    @property
    def tools_template(self) -> str | None:
        """The template for a conversation with tools, or None where the model has none that looks at them."""
        return chat.select_template(self._templates, tools=True) if self.template_reads("tools", tools=True) else None

    def template_reads(self, variable: str, tools: bool = False) -> bool:
        """Whether the chat template (that of a conversation with tools) looks at one of its variables."""
        template = chat.select_template(self._templates, tools)
        return template is not None and chat.reads(template, variable)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text. With special tokens, exactly one BOS comes first where the model's tokenizer adds one."""
        ids = self._engine.encode(text, add_special_tokens)
        return self._one_bos(ids) if add_special_tokens else ids

    def _one_bos(self, ids: list[int]) -> list[int]:
        """Templates and users write a BOS that the tokenizer adds as well; a model never saw two in training."""
        bos = self.bos_token_id
        if not self.adds_bos or bos is None:
            return ids
        count = 0
        while count < len(ids) and ids[count] == bos:
            count += 1
        return ids if count == 1 else [bos, *ids[count:]]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of ids; ids outside the vocabulary have no text."""
        detokenizer = Detokenizer(self, skip_special_tokens)
        return "".join([detokenizer.add(int(i)) for i in ids]) + detokenizer.finalize()

    def token_to_id(self, token: str) -> int | None:
        return self._engine.token_to_id(token)

    def id_to_token(self, token: int) -> str | None:
        return self._engine.id_to_token(token)

    def render_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **extra: Any
    ) -> str:
        """The conversation as text. `extra` reaches the template (tools=..., enable_thinking=...).

        Raises ConfigError when the model has no template, or its template refuses the messages.
        """
        template = chat.select_template(self._templates, tools=bool(extra.get("tools")))
        if template is None:
            raise ConfigError(
                f"[chat template] {self.name_or_path} has none: it is a base model, which continues text; "
                "give it the text to continue, with --ignore-chat-template or tokenizer.encode(text)"
            )
        return chat.render(template, messages, add_generation_prompt, {**self.special_tokens, **extra})

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **extra: Any
    ) -> list[int]:
        """The conversation as ids, with exactly one BOS where the tokenizer adds one, whatever the template does."""
        text = self.render_chat_template(messages, add_generation_prompt, **extra)
        return self._one_bos(self._engine.encode(text, False))
