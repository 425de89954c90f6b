"""GGUF files written by the package that owns the format, and by hand where it refuses a type."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

Tensor = tuple[str, np.ndarray, GGMLQuantizationType | None]


def add_value(writer: GGUFWriter, key: str, value: Any) -> None:
    """A metadata value by its Python type; integers are uint32, as converters write sizes and token ids."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value) if value >= 0 else writer.add_int32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def write(path: Path, architecture: str, metadata: dict[str, Any], tensors: list[Tensor]) -> Path:
    """A file by GGUFWriter. tensors: (name, array, type), the type given where the array is raw bytes."""
    writer = GGUFWriter(path, architecture)
    for key, value in metadata.items():
        add_value(writer, key, value)
    for name, array, kind in tensors:
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def value(item: Any) -> bytes:
    """Type number and value of bool, int (uint32), float (float32), str, or a list of one of these."""
    if isinstance(item, list):
        kind, _ = _scalar(item[0])
        return struct.pack("<IIQ", 9, kind, len(item)) + b"".join(_scalar(i)[1] for i in item)
    kind, raw = _scalar(item)
    return struct.pack("<I", kind) + raw


def _scalar(item: Any) -> tuple[int, bytes]:
    if isinstance(item, bool):
        return 7, struct.pack("<B", item)
    if isinstance(item, int):
        return (4, struct.pack("<I", item)) if item >= 0 else (5, struct.pack("<i", item))
    if isinstance(item, float):
        return 6, struct.pack("<f", item)
    return 8, text(item)


def by_hand(
    metadata: dict[str, Any], tensors: list[tuple[str, tuple[int, ...], int, bytes]], alignment: int = 32
) -> bytes:
    """A version 3 file. tensors: (name, shape outermost first, type number, bytes)."""
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    header += b"".join(text(key) + value(item) for key, item in metadata.items())
    data = b""
    for name, shape, kind, raw in tensors:
        header += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape[::-1])
        header += struct.pack("<IQ", kind, len(data))
        data += raw + bytes(-len(raw) % alignment)
    return header + bytes(-len(header) % alignment) + data
