"""A teacher's most likely tokens at every position of a window, on disk, so that the teacher need not stay in memory.

    DIR/KEY/about.json      what KEY stands for: the teacher's weights and how it computed, K, the temperature
    DIR/KEY/ab/cd...bin     one window: its name is a digest of the token ids

    bytes of a window       16: "BNTC", version, L, K (uint32 each)
                            L * K tokens, uint16 or, in a vocabulary above 65,536, uint32
                            L * K logarithms of their probabilities, float32, and L of all other tokens' together
                            32: SHA-256 of all before

A window is written under another name and renamed when whole, so two writers, or one that was killed, leave no half of one;
what is cut short or changed is taken for absent. Nothing depends on the order of the data, or on how much of it is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bitnet_mlx.errors import MemoryLimitError, TrainError

_MAGIC, _VERSION = b"BNTC", 1
_HEADER, _DIGEST = struct.Struct("<4sIII"), 32
_BLOCK = 1 << 22


class Kept(NamedTuple):
    """Of a window of L positions: the K most likely tokens, [L, K], the logarithms of their probabilities, float32 [L, K], and
    that of all others together, float32 [L]; minus infinity where there are none."""

    indices: np.ndarray
    values: np.ndarray
    rest: np.ndarray


def weights_digest(path: Path) -> str:
    """SHA-256 of a model's files: a GGUF file, or a folder's config.json and safetensors, by name."""
    files = [*sorted(path.glob("*.safetensors")), path / "config.json"] if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with open(file, "rb") as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class TeacherCache:
    """The windows of one teacher. about: all that decides what it says, for the key. k: tokens kept, of `vocab` in all."""

    root: Path
    about: dict[str, Any]
    k: int
    vocab: int

    @property
    def folder(self) -> Path:
        """Where the windows lie."""
        text = json.dumps({**self.about, "k": self.k, "vocab": self.vocab, "version": _VERSION}, sort_keys=True)
        return self.root / hashlib.sha256(text.encode()).hexdigest()[:24]

    @property
    def _dtype(self) -> np.dtype[Any]:
        return np.dtype("<u2" if self.vocab <= 1 << 16 else "<u4")

    def nbytes(self, length: int) -> int:
        """Of a window's file."""
        return _HEADER.size + length * (self.k * (self._dtype.itemsize + 4) + 4) + _DIGEST

    def path(self, ids: np.ndarray) -> Path:
        """The file of a window of token ids [L]."""
        name = hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest()
        return self.folder / name[:2] / f"{name[2:40]}.bin"

    def has(self, ids: np.ndarray) -> bool:
        """Whether there is a file of the right size; only `read` tells whether it is sound."""
        try:
            return self.path(ids).stat().st_size == self.nbytes(len(ids))
        except OSError:
            return False

    def read(self, ids: np.ndarray) -> Kept | None:
        """A window's entry, or None where there is no whole one."""
        length, k = len(ids), self.k
        try:
            data = self.path(ids).read_bytes()
        except OSError:
            return None
        if len(data) != self.nbytes(length) or _HEADER.unpack_from(data) != (_MAGIC, _VERSION, length, k):
            return None
        if hashlib.sha256(memoryview(data)[:-_DIGEST]).digest() != data[-_DIGEST:]:
            return None
        indices = np.frombuffer(data, self._dtype, length * k, _HEADER.size)
        floats = np.frombuffer(data, "<f4", length * (k + 1), _HEADER.size + indices.nbytes)
        return Kept(indices.reshape(length, k), floats[: length * k].reshape(length, k), floats[length * k :])

    def write(self, ids: np.ndarray, kept: Kept) -> None:
        """Keep a window's entry. Raises TrainError where the disk does not take it; what was kept before stays."""
        path, length = self.path(ids), len(ids)
        assert kept.values.shape == (length, self.k)
        parts = [kept.indices.astype(self._dtype), kept.values.astype("<f4"), kept.rest.astype("<f4")]
        data = _HEADER.pack(_MAGIC, _VERSION, length, self.k) + b"".join(part.tobytes() for part in parts)
        self._put(path, data + hashlib.sha256(data).digest())

    def size(self) -> tuple[int, int]:
        """Windows that are there, and their bytes."""
        sizes = [file.stat().st_size for file in self.folder.glob("*/*.bin")]
        return len(sizes), sum(sizes)

    def describe(self) -> None:
        """Write about.json, for people. Raises TrainError as `write` does."""
        text = json.dumps({**self.about, "k": self.k, "vocab": self.vocab}, indent=2) + "\n"
        self._put(self.folder / "about.json", text.encode())

    def _put(self, path: Path, data: bytes) -> None:
        scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch.write_bytes(data)
            os.replace(scratch, path)
        except OSError as error:
            with suppress(OSError):
                scratch.unlink(missing_ok=True)
            raise TrainError(
                f"[qat] --teacher-cache: {path} could not be written: {error.strerror}; all that was kept before stays. Make "
                "room on the disk, lower --teacher-top-k, or give another folder, and run again"
            ) from error

    def check_room(self, windows: int, length: int) -> None:
        """Raise MemoryLimitError where the disk has no room for so many more windows of `length` positions."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainError(
                f"[qat] --teacher-cache: {self.folder} could not be made: {error.strerror}; give another folder"
            ) from error
        needed, free = windows * self.nbytes(length), shutil.disk_usage(self.folder).free
        if needed > free:
            raise MemoryLimitError(
                f"[qat] --teacher-cache: {windows} windows take {needed / 1e9:.2f} GB, and the disk of {self.root} has "
                f"{free / 1e9:.2f} GB free; make room, lower --teacher-top-k or --iters, or give another folder"
            )
