"""What of a model's hidden states is a text's embedding, as its files say or the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bitnet_mlx.errors import FormatError
from bitnet_mlx.formats.strict_json import parse_json

PoolingKind = Literal["mean", "last"]
# sentence-transformers' names, and llama.cpp's numbers.
_MODES: dict[str, PoolingKind] = {"mean": "mean", "mean_tokens": "mean", "lasttoken": "last", "last": "last"}
_GGUF: dict[int, PoolingKind] = {1: "mean", 3: "last"}


@dataclass(frozen=True)
class Pooling:
    """kind: the mean of all tokens' last hidden states, or the last token's. normalize: to a length of 1."""

    kind: PoolingKind
    normalize: bool = True


def find_pooling(where: str | Path, asked: str | None, gguf: int | None = None) -> Pooling | None:
    """What --pooling says, else what the model's own files do; None for a model that makes no embeddings.

    where: a folder, whose modules.json is sentence-transformers', or a GGUF file, whose own number is `gguf`. A model that
    says nothing of a norm is normalised. Raises FormatError for a damaged file.
    """
    path = Path(where)
    stated = _of_gguf(gguf) if path.is_file() else _of_folder(path)
    if asked is None:
        return stated
    return None if asked == "none" else Pooling("mean" if asked == "mean" else "last", _normalizes(path))


def _of_gguf(number: int | None) -> Pooling | None:
    kind = None if number is None else _GGUF.get(number)
    return Pooling(kind) if kind else None


def _modules(folder: Path) -> dict[str, str]:
    """The kinds of sentence-transformers' modules, each with its folder."""
    modules = _json(folder / "modules.json", [])
    if not isinstance(modules, list) or not all(isinstance(m, dict) for m in modules):
        raise FormatError(f"[embeddings] {folder / 'modules.json'} holds no list of modules; download the file again")
    return {str(m.get("type")).rpartition(".")[2]: Path(str(m.get("path"))).name for m in modules}


def _normalizes(folder: Path) -> bool:
    modules = {} if folder.is_file() else _modules(folder)
    return "Normalize" in modules or not modules


def _of_folder(folder: Path) -> Pooling | None:
    modules = _modules(folder)
    if not set(modules) <= {"Transformer", "Pooling", "Normalize"} or "Pooling" not in modules:
        return None  # a layer more (Dense) would be left out
    config = _json(folder / modules["Pooling"] / "config.json", {})
    names = [name.removeprefix("pooling_mode_") for name, on in config.items() if on is True]
    kinds: list[PoolingKind | None] = [
        _MODES.get(name) for name in [*names, config.get("pooling_mode")] if name not in (None, "include_prompt")
    ]
    kind = kinds[0] if len(kinds) == 1 else None
    return Pooling(kind, _normalizes(folder)) if kind else None


def _json(path: Path, missing: Any) -> Any:
    return parse_json(path.read_text(encoding="utf-8"), f"[embeddings] {path}") if path.is_file() else missing
