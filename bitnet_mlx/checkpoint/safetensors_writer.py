"""Writing safetensors: streamed, aligned, and whole or not at all.

The header is padded with spaces so that the data starts at a multiple of 64 bytes. The format allows no holes, so
tensors whose size is a multiple of 64 bytes come first, then of 32, and so on: the big ones lie on 64-byte boundaries.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from bitnet_mlx.checkpoint.safetensors_file import STORAGE
from bitnet_mlx.errors import FormatError

ALIGNMENT = 64


@dataclass(frozen=True)
class Pending:
    """A tensor to be written. blocks(): its values in row-major order, as arrays of any sizes whose bytes add up."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[np.ndarray]]

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


def write_safetensors(path: Path | str, tensors: Sequence[Pending], metadata: Mapping[str, str] | None = None) -> int:
    """Write a file and return its size in bytes.

    The data goes to a temporary name beside `path`, is flushed to the disk, and is renamed when whole; on any failure
    nothing is left. Raises FormatError where a tensor's blocks are not what it promised, or a name comes twice.
    """
    path = Path(path)
    ordered = sorted(tensors, key=lambda t: -math.gcd(t.nbytes, ALIGNMENT) if t.nbytes else -ALIGNMENT)
    header = _header(ordered, metadata or {})
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(header)
            for tensor in ordered:
                _write_blocks(file, tensor)
            size = file.tell()
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return size


def _header(ordered: Sequence[Pending], metadata: Mapping[str, str]) -> bytes:
    table: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    at = 0
    for tensor in ordered:
        if tensor.name in table:
            raise FormatError(f"[safetensors] the tensor {tensor.name} was to be written twice")
        table[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write_blocks(file: BinaryIO, tensor: Pending) -> None:
    kind = np.dtype(STORAGE[tensor.dtype])
    written = 0
    for block in tensor.blocks():
        if block.dtype != kind:
            raise FormatError(f"[safetensors] tensor {tensor.name}: a block of {block.dtype} came; {kind} was promised")
        written += block.nbytes
        if block.nbytes:  # nothing to write, and no memoryview of it
            file.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
    if written != tensor.nbytes:
        raise FormatError(
            f"[safetensors] tensor {tensor.name}: {written} bytes came; "
            f"{tensor.dtype} {list(tensor.shape)} takes {tensor.nbytes}"
        )
