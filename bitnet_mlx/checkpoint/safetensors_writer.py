"""Writing safetensors: streamed, aligned, and whole or not at all.

The header is padded with spaces so that the data starts at a multiple of 64 bytes. The format allows no holes, so
tensors whose size is no multiple of 64 bytes wait and come last, those of 32 first: the big ones lie on 64-byte
boundaries.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bitnet_mlx.checkpoint.safetensors_file import STORAGE
from bitnet_mlx.checkpoint.whole_file import WholeFile
from bitnet_mlx.errors import FormatError

ALIGNMENT = 64
ENTRY_ROOM = 160  # bytes of the header that one tensor takes at most, its name aside
_WAITING_LIMIT = 64 << 20  # bytes


@dataclass(frozen=True)
class Pending:
    """A tensor to be written. blocks(): its values in row-major order, as arrays of any sizes whose bytes add up.

    after: a tensor that must be written before this one, because its blocks make this one's values.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[np.ndarray]]
    after: str | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(STORAGE[self.dtype]).itemsize


def pending(name: str, array: np.ndarray, dtype: str | None = None) -> Pending:
    """An array that is at hand. dtype: the file's name for it where NumPy has none ("BF16" for uint16)."""
    chosen = dtype or next(key for key, kind in STORAGE.items() if array.dtype == kind)
    if np.dtype(STORAGE[chosen]) != array.dtype:
        raise FormatError(
            f"[safetensors] tensor {name} is {array.dtype}; {chosen} is held as {STORAGE[chosen].__name__}"
        )
    return Pending(name, chosen, array.shape, lambda: [array])


class SafetensorsStream(WholeFile):
    """A file that takes one tensor after another: `with SafetensorsStream(path, room) as file: file.add(tensor)`.

    room: bytes kept for the header. seen: as WholeFile has it.
    """

    def __init__(
        self,
        path: Path | str,
        room: int,
        metadata: Mapping[str, str] | None = None,
        seen: Callable[[str, np.ndarray], None] | None = None,
    ) -> None:
        super().__init__(path, 8 + room + -(8 + room) % ALIGNMENT, seen)
        self._table: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        self._waiting: list[Pending] = []
        self._waiting_bytes = 0

    @property
    def size(self) -> int:
        """Bytes of the file so far, the header's room among them."""
        return self._room + self._at

    def add(self, tensor: Pending) -> None:
        """Write a tensor, now or with those that wait. Raises FormatError where its blocks are not what it promised, or
        its name comes twice."""
        if tensor.name in self._table:
            raise FormatError(f"[safetensors] the tensor {tensor.name} was to be written twice")
        self._table[tensor.name] = None
        if tensor.nbytes % ALIGNMENT == 0 and not any(tensor.after == other.name for other in self._waiting):
            self._write(tensor)
            return
        self._waiting.append(tensor)
        self._waiting_bytes += tensor.nbytes
        if self._waiting_bytes > _WAITING_LIMIT:
            self._flush()

    def _flush(self) -> None:
        for tensor in sorted(self._waiting, key=lambda t: (t.after is not None, -math.gcd(t.nbytes, ALIGNMENT))):
            self._write(tensor)
        self._waiting, self._waiting_bytes = [], 0

    def _write(self, tensor: Pending) -> None:
        start, kind = self._at, f"{tensor.dtype} {list(tensor.shape)}"
        self._write_blocks("safetensors", tensor.name, _checked(tensor), tensor.nbytes, kind)
        self._table[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, self._at],
        }

    def _header(self) -> bytes:
        self._flush()
        text = _json(self._table)
        if len(text) > self._room - 8:
            raise AssertionError(f"[safetensors] the header takes {len(text)} bytes; {self._room - 8} were kept for it")
        text += b" " * (self._room - 8 - len(text))
        return len(text).to_bytes(8, "little") + text


def _checked(tensor: Pending) -> Iterator[np.ndarray]:
    kind = np.dtype(STORAGE[tensor.dtype])
    for block in tensor.blocks():
        if block.dtype != kind:
            raise FormatError(f"[safetensors] tensor {tensor.name}: a block of {block.dtype} came; {kind} was promised")
        yield block


def _json(table: Mapping[str, object]) -> bytes:
    return json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode("utf-8")


def write_safetensors(path: Path | str, tensors: Sequence[Pending], metadata: Mapping[str, str] | None = None) -> int:
    """Write a file of tensors that are all known, and return its size in bytes. Raises as SafetensorsStream."""
    room = len(_json({"__metadata__": dict(metadata or {}), **{tensor.name: None for tensor in tensors}}))
    with SafetensorsStream(path, room + ENTRY_ROOM * (1 + len(tensors)), metadata) as file:
        for tensor in tensors:
            file.add(tensor)
    return file.size
