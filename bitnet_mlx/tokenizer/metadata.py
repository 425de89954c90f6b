"""What the JSON files beside a tokenizer say: special tokens, added tokens, chat templates, token ids of the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitnet_mlx.errors import FormatError
from bitnet_mlx.formats.strict_json import parse_json

NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched in the text before the model's own splitting."""

    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


@dataclass(frozen=True)
class Metadata:
    """The JSON files of one folder, united. Ids are those that the files state; texts still need a vocabulary."""

    folder: Path
    named: dict[str, str]  # "bos_token": "<s>" and so on
    added: dict[int, AddedToken]
    templates: dict[str, str]  # chat templates by name; a single one is called "default"
    eos_ids: tuple[int, ...]
    bos_id: int | None
    pad_id: int | None
    add_bos: bool | None
    add_eos: bool | None
    legacy: bool
    generation_config: dict[str, Any] = field(default_factory=dict)


def read_metadata(folder: Path) -> Metadata:
    """Read what is there of the JSON and template files. Raises FormatError naming the file that is damaged."""
    config = _read_json(folder / "config.json")
    generation = _read_json(folder / "generation_config.json")
    settings = _read_json(folder / "tokenizer_config.json")
    special = _read_json(folder / "special_tokens_map.json")
    return Metadata(
        folder=folder,
        named=_named_tokens(settings, special),
        added=_added_tokens(settings, _read_json(folder / "added_tokens.json"), folder),
        templates=_templates(folder, settings),
        eos_ids=_ids(config, "eos_token_id", folder / "config.json")
        + _ids(generation, "eos_token_id", folder / "generation_config.json"),
        bos_id=_first(_ids(config, "bos_token_id", folder / "config.json")),
        pad_id=_first(_ids(config, "pad_token_id", folder / "config.json")),
        add_bos=_flag(settings, "add_bos_token"),
        add_eos=_flag(settings, "add_eos_token"),
        legacy=settings.get("legacy") is True,
        generation_config=generation,
    )


def _read_json(path: Path) -> dict[str, Any]:
    """A missing file is an empty table."""
    if not path.is_file():
        return {}
    try:
        value = parse_json(path.read_text(encoding="utf-8"), f"[tokenizer] {path}")
    except UnicodeDecodeError as error:
        raise FormatError(f"[tokenizer] {path} is not UTF-8: {error}; download the file again") from error
    if not isinstance(value, dict):
        raise FormatError(f"[tokenizer] {path} holds a {type(value).__name__}; a JSON object is expected")
    return value


def _text(value: Any) -> str | None:
    """A token is written as a string or as {"content": string, ...}."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _named_tokens(settings: dict[str, Any], special: dict[str, Any]) -> dict[str, str]:
    """tokenizer_config.json wins over special_tokens_map.json; an explicit null there stands."""
    named = {}
    for name in NAMED:
        text = _text(settings[name] if name in settings else special.get(name))
        if text is not None:
            named[name] = text
    return named


def _added_tokens(settings: dict[str, Any], older: dict[str, Any], folder: Path) -> dict[int, AddedToken]:
    """added_tokens_decoder of tokenizer_config.json ({id: token}), else added_tokens.json ({text: id})."""
    added: dict[int, AddedToken] = {}
    for text, number in older.items():
        if not isinstance(number, int):
            raise FormatError(
                f"[tokenizer] {folder / 'added_tokens.json'} gives {text!r} the id {number!r}; an integer is expected"
            )
        added[number] = AddedToken(text)
    for number, token in (settings.get("added_tokens_decoder") or {}).items():
        text = _text(token)
        if text is None or not str(number).isdigit():
            raise FormatError(
                f"[tokenizer] {folder / 'tokenizer_config.json'}: added token {number!r}: {token!r} has no id or text"
            )
        flags = token if isinstance(token, dict) else {}
        names = ("special", "lstrip", "rstrip", "single_word", "normalized")
        added[int(number)] = AddedToken(text, *(bool(flags.get(name, False)) for name in names))
    return added


def _templates(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    """chat_template.jinja wins over chat_template.json, which wins over tokenizer_config.json, as in transformers."""
    value = settings.get("chat_template")
    templates: dict[str, str] = {}
    if isinstance(value, str):
        templates = {"default": value}
    elif isinstance(value, list):  # [{"name": ..., "template": ...}]
        templates = {
            str(t["name"]): str(t["template"])
            for t in value
            if isinstance(t, dict) and {"name", "template"} <= t.keys()
        }
    elif isinstance(value, dict):
        templates = {str(name): str(template) for name, template in value.items()}
    older = _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(older, str):
        templates = {"default": older}
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            templates = {"default": path.read_text(encoding="utf-8")}
        except UnicodeDecodeError as error:
            raise FormatError(f"[tokenizer] {path} is not UTF-8: {error}; download the file again") from error
        for extra in sorted((folder / "additional_chat_templates").glob("*.jinja")):
            templates[extra.stem] = extra.read_text(encoding="utf-8")
    return templates


def _ids(table: dict[str, Any], name: str, path: Path) -> tuple[int, ...]:
    """An id may be missing, null, an integer or a list of integers."""
    value = table.get(name)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise FormatError(f"[tokenizer] {path}: {name} is {value!r}; an integer or a list of integers is expected")
    return tuple(v for v in values if v >= 0)  # some configs write -1 for "none"


def _first(values: tuple[int, ...]) -> int | None:
    return values[0] if values else None


def _flag(table: dict[str, Any], name: str) -> bool | None:
    value = table.get(name)
    return value if isinstance(value, bool) else None
