"""A file of tensors that appears when it is whole: its header is written last, over the room that was kept for it."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import numpy as np

from bitnet_mlx.errors import FormatError

_File = TypeVar("_File", bound="WholeFile")


class WholeFile(ABC):
    """The data goes to a temporary name beside `path`, is flushed to the disk, and is renamed when whole; on any failure
    nothing is left.

    room: bytes kept for the header. seen: called with a tensor's name and each block of it that is written.
    """

    def __init__(self, path: Path | str, room: int, seen: Callable[[str, np.ndarray], None] | None) -> None:
        self.path = Path(path)
        self._room, self._seen = room, seen
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        self._at = 0  # bytes behind the header

    def __enter__(self: _File) -> _File:
        self._file = open(self._temporary, "wb")
        self._file.write(bytes(self._room))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                header = self._header()
                self._file.seek(0)
                self._file.write(header)
                self._file.flush()
                os.fsync(self._file.fileno())
                os.replace(self._temporary, self.path)
        finally:
            self._file.close()
            self._temporary.unlink(missing_ok=True)

    @abstractmethod
    def _header(self) -> bytes:
        """Write what still waits; the header, at most `room` bytes. Raises where something is missing."""

    def _write_blocks(self, label: str, name: str, blocks: Iterable[np.ndarray], promised: int, kind: str) -> None:
        """Write a tensor's blocks. label, kind: the format and the tensor's type and shape, for messages.

        Raises FormatError unless the blocks' bytes add up to those promised.
        """
        written = 0
        for block in blocks:
            written += block.nbytes
            if block.nbytes:  # nothing to write, and no memoryview of it
                block = np.ascontiguousarray(block)
                self._file.write(block.reshape(-1).view(np.uint8).data)
                if self._seen:
                    self._seen(name, block)
        if written != promised:
            raise FormatError(f"[{label}] tensor {name}: {written} bytes came; {kind} takes {promised}")
        self._at += written
