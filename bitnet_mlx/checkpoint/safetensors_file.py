"""Reading safetensors: strict, memory-mapped, without a copy.

A file is 8 bytes (little endian) that give the header's length, the header (JSON: name -> dtype, shape, data_offsets),
and the data, which the tensors cover without holes or overlaps. Arrays are read-only views of the map; NumPy has no
bfloat16 and no 8-bit floats, so those come as uint16 and uint8 with the file's own name for the dtype beside them.
The `safetensors` package copies each tensor and cannot hand out bfloat16 to NumPy, which is why this is written here.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_mlx.errors import FormatError
from bitnet_mlx.formats.git_lfs import refuse_pointer
from bitnet_mlx.formats.strict_json import parse_json, shown

HEADER_LIMIT = 100_000_000  # bytes, as in the format's own reader
STORAGE: dict[str, type[np.generic]] = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "F8_E4M3": np.uint8, "F8_E5M2": np.uint8,
    "U16": np.uint16, "I16": np.int16, "F16": np.float16, "BF16": np.uint16,
    "U32": np.uint32, "I32": np.int32, "F32": np.float32,
    "U64": np.uint64, "I64": np.int64, "F64": np.float64,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies. dtype: the file's name for it. start, stop: bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


class SafetensorsFile:
    """One open file. `tensors`: its table. `metadata`: the header's own strings. `nbytes`: the file's size."""

    def __init__(self, path: Path | str) -> None:
        """Map the file and check its header. Raises FormatError that names the file, the tensor and what is wrong."""
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                self.nbytes = file.seek(0, 2)
                file.seek(0)
                header, self.data_start = _read_header(file, self.nbytes, self.path)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise FormatError(f"[safetensors] {self.path} cannot be read: {error.strerror or error}") from error
        self.metadata = _metadata(header.pop("__metadata__", {}), self.path)
        self.tensors = {
            name: _entry(name, entry, self.data_start, self.nbytes, self.path) for name, entry in header.items()
        }
        _check_cover(self.tensors.values(), self.data_start, self.nbytes, self.path)

    def array(self, name: str) -> np.ndarray:
        """A read-only view of a tensor; the map lives as long as a view does. Raises FormatError on an unknown name."""
        info = self.tensors.get(name)
        if info is None:
            raise FormatError(
                f"[safetensors] {self.path} holds no tensor {name!r}; it holds {len(self.tensors)} others"
            )
        dtype = np.dtype(STORAGE[info.dtype])
        count = (info.stop - info.start) // dtype.itemsize
        if count == 0:
            return np.broadcast_to(np.zeros((), dtype), info.shape)
        return np.frombuffer(self._map, dtype, count, info.start).reshape(info.shape)

    def release(self, name: str) -> None:
        """Let the system drop a tensor's pages, which come back from the file when touched: for one-pass reading."""
        if not hasattr(self._map, "madvise") or not hasattr(mmap, "MADV_DONTNEED"):
            return
        info = self.tensors[name]
        first = -(-info.start // mmap.PAGESIZE) * mmap.PAGESIZE
        whole = (info.stop - first) // mmap.PAGESIZE * mmap.PAGESIZE
        if whole > 0:
            self._map.madvise(mmap.MADV_DONTNEED, first, whole)


def _read_header(file: Any, size: int, path: Path) -> tuple[dict[str, Any], int]:
    """The header's table and where the data starts."""
    start = file.read(8)
    if len(start) < 8:
        raise FormatError(
            f"[safetensors] {path} has {size} bytes; even an empty file of this format has 10. Fetch it again"
        )
    length = int.from_bytes(start, "little")
    if length > HEADER_LIMIT:
        refuse_pointer(path, "safetensors")
        raise FormatError(
            f"[safetensors] {path} claims a header of {length} bytes; at most {HEADER_LIMIT} are allowed. "
            "It is damaged or no safetensors file; fetch it again"
        )
    if 8 + length > size:
        raise FormatError(
            f"[safetensors] {path} claims a header of {length} bytes and has {size} bytes in all; it is truncated. "
            "Fetch it again"
        )
    raw = file.read(length)
    if len(raw) != length:
        raise FormatError(f"[safetensors] {path} ends inside its header ({len(raw)} of {length} bytes). Fetch it again")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"[safetensors] {path}: the header is not UTF-8 (byte {error.start})") from error
    if not text.startswith("{"):
        raise FormatError(f"[safetensors] {path}: the header starts with {text[:1]!r}; a JSON object starts with '{{'")
    header = parse_json(text, f"[safetensors] {path}: the header")
    if not isinstance(header, dict):
        raise FormatError(f"[safetensors] {path}: the header is a {type(header).__name__}; a JSON object is needed")
    return header, 8 + length


def _metadata(value: Any, path: Path) -> dict[str, str]:
    if value is None:  # MLX writes null where it has none
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise FormatError(f"[safetensors] {path}: __metadata__ is {shown(value)}; a table of strings is allowed")
    return value


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _entry(name: str, entry: Any, data_start: int, size: int, path: Path) -> TensorInfo:
    """One row of the table, checked by itself."""

    def wrong(text: str) -> FormatError:
        return FormatError(f"[safetensors] {path}: tensor {shown(name)} {text}")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        keys = sorted(map(shown, entry)) if isinstance(entry, dict) else shown(entry)
        raise wrong(f"is described by {keys}; dtype, shape and data_offsets are needed")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in STORAGE:
        raise wrong(f"has dtype {shown(dtype)}; {', '.join(STORAGE)} are allowed")
    if not isinstance(shape, list) or not all(map(_is_size, shape)) or len(shape) > 32:
        raise wrong(f"has shape {shown(shape)}; a list of at most 32 integers from 0 on is needed")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise wrong(f"has data_offsets {shown(offsets)}; two integers from 0 on are needed")
    start, stop = offsets
    if start > stop or stop > size - data_start:
        raise wrong(
            f"lies at {shown(offsets)} and the file has {size - data_start} bytes of data; "
            "it is truncated or damaged. Fetch it again"
        )
    needed = math.prod(shape) * np.dtype(STORAGE[dtype]).itemsize
    if needed != stop - start:
        raise wrong(f"has {stop - start} bytes; {dtype} {shown(shape)} takes {shown(needed)}")
    if needed == 0 and math.prod(filter(None, shape)) >= 1 << 40:
        raise wrong(f"is empty with shape {shown(shape)}; its other sizes are beyond what an array can have")
    return TensorInfo(name, dtype, tuple(shape), data_start + start, data_start + stop)


def _check_cover(tensors: Iterable[TensorInfo], data_start: int, size: int, path: Path) -> None:
    """The tensors must cover the data exactly: no overlap, no hole, nothing left at the end."""
    at, before = data_start, "the header"
    for info in sorted(tensors, key=lambda t: (t.start, t.stop)):
        if info.start != at:
            word = "overlaps" if info.start < at else "leaves a hole after"
            raise FormatError(
                f"[safetensors] {path}: tensor {shown(info.name)} {word} {before} "
                f"(it starts at {info.start - data_start}, {at - data_start} was expected)"
            )
        at, before = info.stop, f"tensor {shown(info.name)}"
    if at != size:
        raise FormatError(f"[safetensors] {path}: {size - at} bytes follow {before} and belong to no tensor")
