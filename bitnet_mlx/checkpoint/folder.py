"""A checkpoint folder: its config.json, its weight files as one table of tensors, its tokenizer files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_mlx.checkpoint.safetensors_file import SafetensorsFile, TensorInfo
from bitnet_mlx.errors import ConfigError, FormatError, UnsupportedModelError
from bitnet_mlx.formats.strict_json import parse_json, shown

SINGLE, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_config.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "spiece.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
VOCABULARIES = {"tokenizer.json": "tokenizers", "tokenizer.model": "sentencepiece", "spiece.model": "sentencepiece"}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def checkpoint_folder(path: str | os.PathLike[str]) -> Path:
    """The path as an existing checkpoint folder. Raises ConfigError or UnsupportedModelError that say what works."""
    folder = Path(path)
    if folder.is_file():
        if folder.suffix == ".gguf":
            raise UnsupportedModelError(
                f"[checkpoint] {folder} is a GGUF file, which is not used here; give a folder with config.json and "
                "model.safetensors, such as the model's Hugging Face repository"
            )
        raise ConfigError(
            f"[checkpoint] {folder} is a file; a folder with config.json and safetensors weights is needed"
            + (f", perhaps {folder.parent}" if (folder.parent / "config.json").is_file() else "")
        )
    if not folder.is_dir():
        raise ConfigError(
            f"[checkpoint] there is no folder {folder}; give a folder with config.json and safetensors weights"
        )
    return folder


def read_json(path: Path) -> Any:
    """A JSON file of a checkpoint; FormatError names the file and what is wrong with it."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise FormatError(f"[checkpoint] {path} cannot be read: {error.strerror or error}") from error
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"[checkpoint] {path} is not UTF-8 (byte {error.start})") from error
    return parse_json(text, f"[checkpoint] {path}")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder, as a table."""
    path = folder / "config.json"
    if not path.is_file():
        if (folder / ADAPTER).is_file():
            raise FormatError(
                f"[checkpoint] {folder} is an adapter; give it as --adapter-path, and its base as --model"
            )
        raise FormatError(f"[checkpoint] {folder} has no config.json; {_contents(folder)}. A model folder needs one")
    config = read_json(path)
    if not isinstance(config, dict):
        raise FormatError(f"[checkpoint] {path} holds a {type(config).__name__}; a JSON object is needed")
    return config


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a folder, all present. FormatError names every missing shard at once."""
    if (folder / SINGLE).is_file():
        return (folder / SINGLE,)
    if (folder / INDEX).is_file():
        names = sorted(set(_weight_map(folder).values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise FormatError(
                f"[checkpoint] {folder} lacks {len(missing)} of its {len(names)} weight files: {', '.join(missing)}. "
                "The download is incomplete; fetch the model again"
            )
        return tuple(folder / name for name in names)
    pickles = sorted(path.name for suffix in PICKLES for path in folder.glob(f"*{suffix}"))
    if pickles:
        raise UnsupportedModelError(
            f"[checkpoint] {folder} holds its weights as {', '.join(pickles[:4])}: pickles, which can run code and are "
            "never read. Convert them: transformers' model.save_pretrained(DIR) writes safetensors"
        )
    if (folder / SINGLE).is_symlink():
        raise FormatError(f"[checkpoint] {folder / SINGLE} points at a file that is gone; fetch the model again")
    raise FormatError(f"[checkpoint] {folder} has no {SINGLE} and no {INDEX}; {_contents(folder)}")


def _contents(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return "it is empty"
    return f"it holds {first_names(names)}"


def first_names(names: Sequence[str]) -> str:
    """Names for a message: eight of them, and how many more there are."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index; file names must lie in the folder."""
    path = folder / INDEX
    index = read_json(path)
    table = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(table, dict) or not table:
        raise FormatError(f"[checkpoint] {path} has no weight_map of tensors to files")
    for name, file in table.items():
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", file):
            raise FormatError(
                f"[checkpoint] {path} puts tensor {shown(name)} into {shown(file)}; "
                "a .safetensors file of the same folder is allowed"
            )
    return table


@dataclass(frozen=True)
class _Home:
    """Where a tensor lies: its file, its name there, and the rows of that tensor that it is (None: all)."""

    file: SafetensorsFile
    name: str
    rows: slice | None = None


class TensorTable:
    """All tensors of a folder, whatever file each lies in. A tensor may go by another name, or be rows of another one.

    one_pass: values are read once, so pages may go at once.
    """

    one_pass = False

    def __init__(self, folder: Path) -> None:
        """Open every weight file. Raises FormatError where files are missing, damaged or at odds with the index."""
        self.folder = folder
        self.files = [SafetensorsFile(path) for path in weight_files(folder)]
        self._home: dict[str, _Home] = {}
        for file in self.files:
            for name in file.tensors:
                if name in self._home:
                    raise FormatError(
                        f"[checkpoint] tensor {shown(name)} lies in {self._home[name].file.path} and in {file.path}; "
                        "one place is allowed"
                    )
                self._home[name] = _Home(file, name)
        if self.files[0].path.name != SINGLE:
            self._check_index(_weight_map(folder))

    def _check_index(self, table: dict[str, str]) -> None:
        where = {name: home.file.path.name for name, home in self._home.items()}
        absent = [name for name in table if name not in where]
        unlisted = [name for name in where if name not in table]
        moved = [name for name in table if name in where and where[name] != table[name]]
        for names, text in (
            (absent, "lists tensors that no file holds"),
            (unlisted, "does not list tensors that the files hold"),
            (moved, "gives the wrong file for tensors"),
        ):
            if names:
                raise FormatError(
                    f"[checkpoint] {self.folder / INDEX} {text}: {name_list(names)}. Fetch the model again"
                )

    def rename(self, names: Mapping[str, str]) -> None:
        """Call tensors by other names: the one that they have -> the one to use, which no tensor may have."""
        for old, new in names.items():
            assert new not in self._home
            self._home[new] = self._home.pop(old)

    def cut(self, name: str, parts: Mapping[str, slice]) -> None:
        """Replace a tensor by parts of its rows, each under a name of its own."""
        home = self._home.pop(name)
        self._home.update({part: _Home(home.file, home.name, rows) for part, rows in parts.items()})

    def __contains__(self, name: str) -> bool:
        return name in self._home

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)

    def label(self, name: str) -> str:
        """The tensor's name in its file, for messages."""
        home = self._home[name]
        return home.name if home.rows is None else f"{home.name}[{home.rows.start}:{home.rows.stop}]"

    def info(self, name: str) -> TensorInfo:
        home = self._home[name]
        info = home.file.tensors[home.name]
        if home.rows is None:
            return info
        rows = range(info.shape[0])[home.rows]
        row = (info.stop - info.start) // max(info.shape[0], 1)
        start = info.start + rows.start * row
        return replace(info, shape=(len(rows), *info.shape[1:]), start=start, stop=start + len(rows) * row)

    def path(self, name: str) -> Path:
        return self._home[name].file.path

    def array(self, name: str) -> np.ndarray:
        """A read-only view of the tensor in its file."""
        home = self._home[name]
        array = home.file.array(home.name)
        return array if home.rows is None else array[home.rows]

    def rows(self, name: str) -> slice | None:
        """Which rows of a larger tensor it is, or None."""
        return self._home[name].rows

    def whole(self, name: str) -> np.ndarray:
        """The same, or all of the tensor whose rows it is."""
        home = self._home[name]
        return home.file.array(home.name)

    def release(self, name: str) -> None:
        """The tensor will not be read again soon: its pages may leave memory."""
        home = self._home[name]
        if home.rows is None:
            home.file.release(home.name)

    @property
    def nbytes(self) -> int:
        """Size of all files."""
        return sum(file.nbytes for file in self.files)


def name_list(names: Sequence[str]) -> str:
    """Names for a message, all of them: past eight, those that differ in the layer alone are told as a range."""
    if len(names) <= 8:
        return ", ".join(shown(name).strip("'\"") for name in sorted(names))
    layers: dict[str, list[int]] = {}
    for name in names:
        match = re.search(r"\.(\d{1,9})\.", name)
        pattern = f"{name[: match.start()]}.*.{name[match.end() :]}" if match else name
        layers.setdefault(pattern, []).extend([int(match[1])] if match else [])
    lines = []
    for pattern, numbers in sorted(layers.items()):
        text = shown(pattern).strip("'\"")
        lines.append(f"{text} (layers {_ranges(numbers)})" if numbers else text)
    more = f" and {len(lines) - 40} more kinds" if len(lines) > 40 else ""
    return ", ".join(lines[:40]) + more


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    texts = [f"{first}-{last}" if last > first else str(first) for first, last in parts]
    return ", ".join(texts[:20]) + (" ..." if len(texts) > 20 else "")
