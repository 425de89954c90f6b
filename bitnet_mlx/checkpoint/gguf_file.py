"""Reading GGUF: strict, memory-mapped, without a copy, versions 2 and 3, little endian.

A file is "GGUF", its version (uint32), two counts (uint64), the metadata (key, type, value), the tensor table (name,
dimensions from the innermost out, type, offset), padding, and the data. The `gguf` package refuses the types that BitNet
files have and reads a large vocabulary slowly, which is why this is written here.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_mlx.checkpoint import gguf_types
from bitnet_mlx.errors import FormatError, UnsupportedModelError
from bitnet_mlx.formats.git_lfs import refuse_pointer
from bitnet_mlx.formats.strict_json import shown

ALIGNMENT = 32  # bytes, where the metadata names no other
_STRING, _ARRAY = 8, 9
# Type number -> NumPy's little-endian name. Booleans are bytes of 0 or 1.
_SCALARS = {
    0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_LIMIT = 1 << 48  # elements of one tensor


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies. shape: outermost first, as NumPy has it. start, stop: bytes from the start of the file.

    kind: the type's name, or "type 99". room: bytes up to the next tensor. stop is None for a type whose size is unknown.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    stop: int | None
    room: int

    def __str__(self) -> str:
        return f"{self.kind} {list(self.shape)}"


class GgufFile:
    """One open file. `metadata`: its keys. `tensors`: its table. `nbytes`: its size. `alignment`: of the data, bytes.

    It stands for its path wherever a path is taken, so that what reads a part of it need not parse it again (`opened`).
    """

    def __init__(self, path: Path | str) -> None:
        """Map the file and check its header. Raises FormatError that names the file, the key or tensor and the fault."""
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                self.nbytes = file.seek(0, 2)
                if self.nbytes < 24:
                    raise FormatError(
                        f"[gguf] {self.path} has {self.nbytes} bytes; a GGUF file has at least 24. Fetch it again"
                    )
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise FormatError(f"[gguf] {self.path} cannot be read: {error.strerror or error}") from error
        cursor = _Cursor(self._map, self.path)
        tensors, keys = _header(cursor)
        self.metadata = _metadata(cursor, keys)
        self.alignment = _alignment(self.metadata, self.path)
        table = [_tensor_info(cursor) for _ in range(tensors)]
        data_start = -(-cursor.at // self.alignment) * self.alignment
        self.tensors = _place(table, data_start, self.alignment, self.nbytes, self.path)

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def array(self, name: str) -> np.ndarray:
        """A tensor's bytes, a read-only uint8 view of the map. Raises FormatError on an unknown name or size."""
        info = self.tensors.get(name)
        if info is None:
            raise FormatError(f"[gguf] {self.path} holds no tensor {shown(name)}; it holds {len(self.tensors)} others")
        if info.stop is None:
            raise FormatError(f"[gguf] {self.path}: tensor {shown(name)} is {info}; its size is not known")
        return np.frombuffer(self._map, np.uint8, info.stop - info.start, info.start)

    def region(self, name: str, size: int) -> np.ndarray:
        """The first `size` bytes of a tensor's room, for types whose size the file's table does not tell."""
        info = self.tensors[name]
        if size > info.room:
            raise FormatError(
                f"[gguf] {self.path}: tensor {shown(name)} is {info} and needs {size} bytes; "
                f"{info.room} are there. Fetch it again"
            )
        return np.frombuffer(self._map, np.uint8, size, info.start)

    def release(self, name: str) -> None:
        """Let the system drop a tensor's pages, which come back from the file when touched: for one-pass reading."""
        if not hasattr(self._map, "madvise") or not hasattr(mmap, "MADV_DONTNEED"):
            return
        info = self.tensors[name]
        first = -(-info.start // mmap.PAGESIZE) * mmap.PAGESIZE
        whole = (info.start + info.room - first) // mmap.PAGESIZE * mmap.PAGESIZE
        if whole > 0:
            self._map.madvise(mmap.MADV_DONTNEED, first, whole)


def opened(source: Path | str | GgufFile) -> GgufFile:
    """The file itself where it is open already, else opened here. Raises what GgufFile raises."""
    return source if isinstance(source, GgufFile) else GgufFile(source)


def is_gguf(path: Path | str | GgufFile) -> bool:
    """Whether a path is a file called .gguf, or one without such an ending (a cache's) that begins as GGUF does."""
    if isinstance(path, GgufFile):
        return True
    path = Path(path)
    if not path.is_file() or path.suffix:
        return path.is_file() and path.suffix.lower() == ".gguf"
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


class _Cursor:
    """Reads a map from the front; what would pass the end is a FormatError that says what was being read."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data, self.path, self.at, self.what = data, path, 0, "the header"

    def wrong(self, text: str) -> FormatError:
        return FormatError(f"[gguf] {self.path}: {self.what} {text}")

    def take(self, size: int) -> bytes:
        if size > len(self._data) - self.at:
            raise self.wrong(
                f"needs {size} bytes at byte {self.at} of a file of {len(self._data)}; "
                "it is truncated or damaged. Fetch it again"
            )
        self.at += size
        return self._data[self.at - size : self.at]

    def u32(self) -> int:
        return struct.unpack("<I", self.take(4))[0]

    def u64(self) -> int:
        return struct.unpack("<Q", self.take(8))[0]

    def text(self) -> str:
        raw = self.take(self.u64())
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.wrong(f"holds text that is not UTF-8 ({raw[:40]!r})") from error

    def _texts(self, count: int) -> list[str]:
        """As `text`, many: a vocabulary has hundreds of thousands."""
        data, at, length, raw = self._data, self.at, struct.Struct("<Q").unpack_from, []
        size = len(data)
        for _ in range(count):
            start = at + 8
            at = start + length(data, at)[0] if start <= size else size + 1
            if at > size:
                self.at = min(start, size)
                raise self.wrong(
                    f"needs text {len(raw)} of {count}, which passes the end; it is truncated. Fetch it again"
                )
            raw.append(data[start:at])
        self.at = at
        try:
            return [text.decode("utf-8") for text in raw]
        except UnicodeDecodeError as error:
            raise self.wrong(f"holds text that is not UTF-8 ({error.object[:40]!r})") from error

    def value(self) -> Any:
        """A value of any type, after its type number."""
        kind = self.u32()
        if kind != _ARRAY:
            return self._items(kind, 1)[0]
        inner = self.u32()
        return self._items(inner, self.u64())

    def _items(self, kind: int, count: int) -> list[Any]:
        if kind == _STRING:
            if count > (len(self._data) - self.at) // 8:
                raise self.wrong(f"has {count} texts; the file is too short for them. Fetch it again")
            return self._texts(count)
        if kind not in _SCALARS:
            raise self.wrong(f"has the value type {kind}; numbers, booleans, texts and arrays of those are allowed")
        dtype = np.dtype(_SCALARS[kind])
        raw = self.take(count * dtype.itemsize)
        if kind == 7 and raw.translate(None, b"\0\1"):
            raise self.wrong("holds a boolean that is neither 0 nor 1")
        return np.frombuffer(raw, dtype).tolist()


def _header(cursor: _Cursor) -> tuple[int, int]:
    """Counts of tensors and keys."""
    magic, version = cursor.take(4), cursor.u32()
    if magic != b"GGUF":
        refuse_pointer(cursor.path, "gguf")
        raise FormatError(
            f"[gguf] {cursor.path} starts with {magic!r}; a GGUF file starts with b'GGUF'. It is another kind of file, or "
            "damaged: fetch it again"
        )
    if version in (2 << 24, 3 << 24):
        raise UnsupportedModelError(f"[gguf] {cursor.path} is a big-endian file; little-endian ones are read")
    if version not in (2, 3):
        raise UnsupportedModelError(f"[gguf] {cursor.path} has version {version}; versions 2 and 3 are read")
    return cursor.u64(), cursor.u64()


def _metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for number in range(count):
        cursor.what = f"metadata key {number} of {count}"
        key = cursor.text()
        cursor.what = f"metadata key {shown(key)}"
        if key in table:
            raise cursor.wrong("is there twice")
        table[key] = cursor.value()
    return table


def _alignment(metadata: dict[str, Any], path: Path) -> int:
    value = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(value, int) or not 8 <= value <= 1 << 20 or value & (value - 1):
        raise FormatError(f"[gguf] {path}: general.alignment is {shown(value)}; a power of two from 8 on is allowed")
    return value


def _tensor_info(cursor: _Cursor) -> tuple[str, int, tuple[int, ...], int]:
    """(name, type number, shape, offset) of one row of the table."""
    cursor.what = "the tensor table"
    name = cursor.text()
    cursor.what = f"tensor {shown(name)}"
    dimensions = cursor.u32()
    if not 1 <= dimensions <= 4:
        raise cursor.wrong(f"has {dimensions} dimensions; 1 to 4 are allowed")
    shape = tuple(cursor.u64() for _ in range(dimensions))[::-1]
    if 0 in shape or math.prod(shape) > _LIMIT:
        raise cursor.wrong(f"has shape {list(shape)}; sizes from 1 on with a product of at most 2^48 are allowed")
    return name, cursor.u32(), shape, cursor.u64()


def _place(
    table: list[tuple[str, int, tuple[int, ...], int]], data_start: int, alignment: int, size: int, path: Path
) -> dict[str, GgufTensor]:
    """The table with every tensor's place, which must lie in the file, apart from the others and without holes."""
    starts = sorted({data_start + offset for *_, offset in table})
    following = dict(zip(starts, [*starts, size][1:], strict=True))
    tensors: dict[str, GgufTensor] = {}
    taken: dict[int, str] = {}
    for name, number, shape, offset in table:
        start = data_start + offset
        kind = gguf_types.NAMES.get(number, f"type {number}")
        if name in tensors:
            raise FormatError(f"[gguf] {path}: tensor {shown(name)} is there twice")
        if start in taken:
            raise FormatError(f"[gguf] {path}: tensors {shown(taken[start])} and {shown(name)} lie in one place")
        taken[start] = name
        needed, room = gguf_types.size(kind, shape, f"{shown(name)} in {path}"), following[start] - start
        found = GgufTensor(name, kind, shape, start, None if needed is None else start + needed, room)
        if offset % alignment or start > size:
            raise FormatError(
                f"[gguf] {path}: tensor {shown(name)} starts at {offset} of {max(size - data_start, 0)} bytes of data; "
                f"a multiple of {alignment} inside them is needed. Fetch it again"
            )
        if needed is not None and not 0 <= room - needed < alignment:
            raise FormatError(
                f"[gguf] {path}: tensor {shown(name)} is {found} and takes {needed} bytes; it has {room} up to "
                f"{'the end of the file' if following[start] == size else 'the next one'}. "
                "The file is truncated or damaged, or a type number means something else in it"
            )
        tensors[name] = found
    return tensors
