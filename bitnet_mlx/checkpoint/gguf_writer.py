"""Writing GGUF version 3: streamed, aligned, whole or not at all. gguf_file.py tells the layout.

The header's size follows from the metadata and the tensors' names and shapes alone, so it is written last, when every
tensor has its type and place.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_mlx.checkpoint import gguf_types
from bitnet_mlx.checkpoint.gguf_file import ALIGNMENT
from bitnet_mlx.checkpoint.safetensors_writer import Pending
from bitnet_mlx.checkpoint.whole_file import WholeFile
from bitnet_mlx.errors import FormatError

_NUMBERS = {name: number for number, name in gguf_types.NAMES.items()}
_ARRAY = 9


@dataclass(frozen=True)
class GgufPending(Pending):
    """dtype: ggml's name of the type. shape: outermost first, in values. blocks(): bytes, or the type's own values."""

    @property
    def nbytes(self) -> int:
        size = gguf_types.size(self.dtype, self.shape, self.name)
        assert size is not None
        return size


class GgufStream(WholeFile):
    """A file that takes one tensor after another.

    expected: (name, shape) of every tensor that will come, in any order.
    """

    def __init__(
        self,
        path: Path | str,
        metadata: Mapping[str, Any],
        expected: Sequence[tuple[str, tuple[int, ...]]],
        seen: Callable[[str, np.ndarray], None] | None = None,
    ) -> None:
        self._metadata = b"".join(_text(key) + _value(value) for key, value in metadata.items())
        self._keys = len(metadata)
        self._expected = dict(expected)
        self._infos: dict[str, bytes] = {}
        size = 24 + len(self._metadata) + sum(len(_info(name, shape, "F32", 0)) for name, shape in expected)
        super().__init__(path, size + -size % ALIGNMENT, seen)

    def add(self, tensor: Pending) -> None:
        """Write a tensor. Raises FormatError where its blocks are not what it promised, or it was not expected."""
        name = tensor.name
        if name in self._infos or self._expected.get(name) != tensor.shape:
            raise FormatError(f"[gguf] the tensor {name} {list(tensor.shape)} was not to be written, or was before")
        self._infos[name] = _info(name, tensor.shape, tensor.dtype, self._at)
        self._write_blocks("gguf", name, tensor.blocks(), tensor.nbytes, f"{tensor.dtype} {list(tensor.shape)}")
        padding = -self._at % ALIGNMENT
        self._file.write(bytes(padding))
        self._at += padding

    def _header(self) -> bytes:
        if missing := [name for name in self._expected if name not in self._infos]:
            raise FormatError(f"[gguf] {len(missing)} tensors never came, such as {missing[0]}")
        header = b"GGUF" + struct.pack("<IQQ", 3, len(self._infos), self._keys) + self._metadata
        return header + b"".join(self._infos.values())


def _info(name: str, shape: tuple[int, ...], kind: str, offset: int) -> bytes:
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
    return _text(name) + dimensions + struct.pack("<IQ", _NUMBERS[kind], offset)


def _text(value: str) -> bytes:
    raw = value.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    """Type number and value: bool, int (uint32, or int32 below 0), float (float32), str, or a list of one of these.

    Integers in lists are int32, as the format's own converters write token types.
    """
    if not isinstance(value, list):
        kind, raw = _scalar(value)
        return struct.pack("<I", kind) + raw
    if value and isinstance(value[0], str):
        return struct.pack("<IIQ", _ARRAY, 8, len(value)) + b"".join(map(_text, value))
    kind, dtype = (6, "<f4") if value and isinstance(value[0], float) else (5, "<i4")
    return struct.pack("<IIQ", _ARRAY, kind, len(value)) + np.array(value, dtype).tobytes()


def _scalar(value: Any) -> tuple[int, bytes]:
    if isinstance(value, bool):
        return 7, struct.pack("<B", value)
    if isinstance(value, int):
        return (4, struct.pack("<I", value)) if value >= 0 else (5, struct.pack("<i", value))
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    return 8, _text(value)
