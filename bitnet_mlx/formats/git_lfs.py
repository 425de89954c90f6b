"""Git LFS pointers: the few lines of text that a clone made without git-lfs has in the place of a large file."""

from __future__ import annotations

from pathlib import Path

from bitnet_mlx.errors import FormatError

_BEGINNING = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(path: Path, operation: str) -> None:
    """Raise FormatError where a file that could not be read is such a pointer. operation: opens the message."""
    try:
        with open(path, "rb") as file:
            pointer = file.read(len(_BEGINNING)) == _BEGINNING
    except OSError:
        return
    if pointer:
        raise FormatError(
            f"[{operation}] {path} is a Git LFS pointer, a line of text in the place of the file: run `git lfs install` and "
            "`git lfs pull` in its folder, or give the model's Hugging Face name (owner/name), which fetches it"
        )
