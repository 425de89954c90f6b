"""The safetensors reader and writer against the format's own library, and against files that lie."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from bitnet_mlx.checkpoint.safetensors_file import HEADER_LIMIT, SafetensorsFile
from bitnet_mlx.checkpoint.safetensors_writer import Pending, pending, write_safetensors
from bitnet_mlx.errors import FormatError


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file from a header (bytes as they are, anything else as JSON) and its data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    as_list = [list(value) if isinstance(value, tuple) else value for value in (shape, offsets)]
    return {"dtype": dtype, "shape": as_list[0], "data_offsets": as_list[1]}


EIGHT = b"\0" * 8
# Each: the file, and what the message must name.
ATTACKS: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "0 bytes"),
    "cut length": (b"\x02\0\0", "3 bytes"),
    "length past the end": (raw({}, length=500), "truncated"),
    "length past the limit": (raw({}, length=HEADER_LIMIT + 1), "at most 100000000"),
    "length of 2^63": (raw({}, length=1 << 63), "at most 100000000"),
    "not UTF-8": (raw(b'{"a\xff":1}'), "not UTF-8"),
    "UTF-16": (raw('{"a":1}'.encode("utf-16")), "not UTF-8"),
    "no object": (raw([1, 2]), "starts with"),
    "not JSON": (raw(b"{not json}"), "not valid JSON"),
    "cut JSON": (raw(b'{"a":'), "not valid JSON"),
    "empty header": (raw(b""), "starts with"),
    "leading space": (raw(b" {}"), "starts with"),
    "deep nesting": (raw(b'{"a":' + b"[" * 100_000 + b"}"), "nested too deeply"),
    "twice the same name": (
        raw(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), EIGHT), "has the key 'a' twice"
    ),
    "twice the same key": (
        raw(b'{"a":{"dtype":"F32","dtype":"I8","shape":[2],"data_offsets":[0,8]}}', EIGHT), "has the key 'dtype' twice"
    ),
    "NaN as an offset": (raw(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,NaN]}}', EIGHT), "NaN"),
    "digits without end": (
        raw(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,%s]}}' % (b"9" * 5000)), "not valid JSON|lies at"
    ),
    "entry is no table": (raw({"a": 5}), "'a'"),
    "missing key": (raw({"a": {"dtype": "F32", "shape": [2]}}, EIGHT), "'a'"),
    "extra key": (raw({"a": {**entry(), "x": 1}}, EIGHT), "'x'"),
    "unknown dtype": (raw({"a": entry("F31")}, EIGHT), "dtype 'F31'"),
    "dtype is a number": (raw({"a": entry(4)}, EIGHT), "dtype 4"),
    "shape is a text": (raw({"a": entry(shape="2")}, EIGHT), "shape '2'"),
    "negative size": (raw({"a": entry(shape=(-2,))}, EIGHT), r"shape \[-2\]"),
    "fractional size": (raw({"a": entry(shape=(2.0,))}, EIGHT), r"shape \[2.0\]"),
    "true as a size": (raw({"a": entry(shape=(True, 2))}, EIGHT), r"shape \[True, 2\]"),
    "huge size": (raw({"a": entry(shape=(1 << 62, 1 << 62))}, EIGHT), "takes"),
    "huge empty": (raw({"a": entry(shape=(0, 1 << 62, 1 << 62), offsets=(0, 0))}), "is empty"),
    "too many axes": (raw({"a": entry(shape=(1,) * 65)}, EIGHT), "at most 32"),
    "one offset": (raw({"a": entry(offsets=(0,))}, EIGHT), "data_offsets"),
    "negative offset": (raw({"a": entry(offsets=(-8, 0))}, EIGHT), "data_offsets"),
    "offsets reversed": (raw({"a": entry(offsets=(8, 0))}, EIGHT), r"lies at \[8, 0\]"),
    "past the data": (raw({"a": entry(shape=(4,), offsets=(0, 16))}, EIGHT), "truncated or damaged"),
    "shape and bytes differ": (raw({"a": entry(shape=(3,))}, EIGHT), r"F32 \[3\] takes 12"),
    "dtype and bytes differ": (raw({"a": entry("F64")}, EIGHT), r"F64 \[2\] takes 16"),
    "overlap": (raw({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12), "'b' overlaps tensor 'a'"),
    "the same bytes twice": (raw({"a": entry(), "b": entry()}, EIGHT), "overlaps"),
    "hole": (raw({"a": entry(), "b": entry(offsets=(12, 20))}, b"\0" * 20), "'b' leaves a hole after tensor 'a'"),
    "hole at the start": (raw({"a": entry(offsets=(4, 12))}, b"\0" * 12), "'a' leaves a hole after the header"),
    "bytes left over": (raw({"a": entry()}, b"\0" * 12), "4 bytes follow tensor 'a'"),
    "data without tensors": (raw({}, EIGHT), "8 bytes follow the header"),
    "metadata is no table": (raw({"__metadata__": 3}), "__metadata__"),
    "metadata with a number": (raw({"__metadata__": {"a": 3}}), "__metadata__"),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_a_lying_file_is_a_named_error(name: str, tmp_path: Path) -> None:
    content, text = ATTACKS[name]
    path = tmp_path / "attack.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=text) as caught:
        SafetensorsFile(path)
    assert "attack.safetensors" in str(caught.value)
    assert len(str(caught.value)) < 1000


# The library takes these: a second key wins there, and sizes past 2^40 without data are none of its concern.
LENIENT = {"leading space", "twice the same name", "twice the same key", "huge empty", "too many axes", "extra key"}


@pytest.mark.parametrize("name", [name for name in ATTACKS if name not in LENIENT])
def test_the_library_refuses_the_same_files(name: str, tmp_path: Path) -> None:
    path = tmp_path / "attack.safetensors"
    path.write_bytes(ATTACKS[name][0])
    with pytest.raises((SafetensorError, OSError, ValueError)), safe_open(path, "np") as file:
        file.keys()


def test_a_folder_and_an_absent_file_are_format_errors(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.safetensors"):
        with pytest.raises(FormatError, match="cannot be read"):
            SafetensorsFile(path)


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {
        "u8": rng.integers(0, 256, (3, 5)).astype(np.uint8),
        "i8": rng.integers(-128, 128, (7,)).astype(np.int8),
        "u32": rng.integers(0, 1 << 32, (4, 8)).astype(np.uint32),
        "f16": rng.standard_normal((2, 3)).astype(np.float16),
        "f32": rng.standard_normal((16, 16)).astype(np.float32),
        "f64": rng.standard_normal((1,)),
        "bool": np.array([True, False]),
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
    }


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(arrays(), path, {"format": "pt"})
    file = SafetensorsFile(path)
    assert file.metadata == {"format": "pt"} and set(file.tensors) == set(arrays())
    for name, array in arrays().items():
        found = file.array(name)
        assert found.dtype == array.dtype and found.shape == array.shape and np.array_equal(found, array)


def test_the_library_and_mlx_read_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    bf16 = pending("bf16", np.arange(6, dtype=np.uint16).reshape(2, 3) + 0x3F80, "BF16")
    ours = {name: array for name, array in arrays().items() if array.dtype != np.float64}  # MLX has no float64 files
    size = write_safetensors(path, [*(pending(name, array) for name, array in ours.items()), bf16], {"a": "b"})
    assert size == path.stat().st_size
    with safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt", "a": "b"}
        for name, array in ours.items():
            assert np.array_equal(file.get_tensor(name), array)
    values = mx.load(str(path))["bf16"]  # type: ignore[index]
    assert values.dtype == mx.bfloat16
    assert np.array(values.view(mx.uint16)).tolist() == [[0x3F80, 0x3F81, 0x3F82], [0x3F83, 0x3F84, 0x3F85]]


def test_bfloat16_comes_as_its_bits(tmp_path: Path) -> None:
    mx.save_safetensors(str(tmp_path / "b.safetensors"), {"x": mx.array([1.0, -2.0]).astype(mx.bfloat16)})
    file = SafetensorsFile(tmp_path / "b.safetensors")
    assert file.tensors["x"].dtype == "BF16"
    assert file.array("x").tolist() == [0x3F80, 0xC000]


def test_arrays_are_read_only_views_of_the_map(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"x": np.arange(1 << 14, dtype=np.uint32)}, path)
    file = SafetensorsFile(path)
    array = file.array("x")
    assert not array.flags.owndata and not array.flags.writeable
    file.release("x")
    assert np.array_equal(array, np.arange(1 << 14))  # released pages come back from the file
    del file
    assert array[-1] == (1 << 14) - 1  # a view keeps the map alive
    with pytest.raises(FormatError, match="no tensor 'y'"):
        SafetensorsFile(path).array("y")


def test_data_and_large_tensors_start_on_64_byte_boundaries(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    wanted = [pending("norm", np.zeros(33, np.float32)), pending("scale", np.float32(1).reshape(()))]
    wanted += [pending(f"words{i}", np.zeros((i, 16), np.uint32)) for i in range(1, 5)]
    write_safetensors(path, wanted)
    file = SafetensorsFile(path)
    assert file.data_start % 64 == 0
    assert all(info.start % 64 == 0 for name, info in file.tensors.items() if name.startswith("words"))
    assert all(file.array(name).flags.aligned for name in file.tensors)


def test_a_tensor_streams_in_blocks(tmp_path: Path) -> None:
    whole = np.arange(40, dtype=np.float32).reshape(8, 5)
    part = Pending("x", "F32", (8, 5), lambda: (whole[at : at + 3] for at in range(0, 8, 3)))
    write_safetensors(tmp_path / "a.safetensors", [part])
    assert np.array_equal(load_file(tmp_path / "a.safetensors")["x"], whole)


def _explode() -> Any:
    yield np.zeros(1, np.float32)
    raise OSError("the disk is full")


FAILURES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "too few bytes": (lambda: [np.zeros(1, np.float32)], FormatError, "4 bytes came"),
    "another dtype": (lambda: [np.zeros(2, np.int32)], FormatError, "int32 came"),
    "an error half way": (_explode, OSError, "disk is full"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(name: str, tmp_path: Path) -> None:
    blocks, kind, text = FAILURES[name]
    (tmp_path / "a.safetensors").write_text("old")
    with pytest.raises(kind, match=text):
        write_safetensors(tmp_path / "a.safetensors", [Pending("x", "F32", (2,), blocks)])
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert (tmp_path / "a.safetensors").read_text() == "old"


def test_a_name_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="x was to be written twice"):
        write_safetensors(tmp_path / "a.safetensors", [pending("x", np.zeros(1))] * 2)
