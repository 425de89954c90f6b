"""The GGUF container: what its owner writes is read, and whatever is damaged is refused by name."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, quants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitnet_mlx.checkpoint.gguf_file import GgufFile, is_gguf
from bitnet_mlx.checkpoint.gguf_tensors import q2_group
from bitnet_mlx.errors import BitnetError, FormatError, UnsupportedModelError
from bitnet_mlx.formats import i2s, words2
from tests.support import gguf_files

METADATA: dict[str, Any] = {
    "a.flag": True, "a.count": 7, "a.less": -7, "a.number": 0.5, "a.text": "naïve ☕",
    "a.texts": ["x", "", "Ġz"], "a.numbers": [1, 2, 3], "a.floats": [0.25, -1.5],
}  # fmt: skip


def read(path: Path, data: bytes) -> GgufFile:
    path.write_bytes(data)
    return GgufFile(path)


def test_what_the_owner_writes_is_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ternary = rng.integers(-1, 2, (6, 512)).astype(np.float32)
    dense = rng.standard_normal((3, 64)).astype(np.float32)
    tensors: list[gguf_files.Tensor] = [
        ("one", np.arange(5, dtype=np.float32), None),
        ("half", dense.astype(np.float16), None),
        *(
            (kind, quants.quantize(ternary, Type[kind]), Type[kind])
            for kind in ("TQ1_0", "TQ2_0", "Q8_0", "Q4_0", "BF16")
        ),
        ("cube", np.arange(24, dtype=np.float32).reshape(2, 3, 4), None),
    ]
    path = gguf_files.write(tmp_path / "a.gguf", "llama", METADATA, tensors)
    file = GgufFile(path)
    assert {key: file.metadata[key] for key in METADATA} == METADATA
    assert file.metadata["general.architecture"] == "llama"
    owner = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    assert list(file.tensors) == [name for name, *_ in tensors]
    for name, array, _ in tensors:
        info = file.tensors[name]
        assert file.array(name).tobytes() == array.tobytes()
        assert info.start == owner[name].data_offset and info.kind == owner[name].tensor_type.name
        assert info.shape == tuple(owner[name].shape[::-1].tolist())
    file.release("TQ2_0")
    assert file.array("TQ2_0").tobytes() == tensors[3][1].tobytes()
    assert not file.array("one").flags.writeable


def test_a_file_of_i2_s(tmp_path: Path) -> None:
    """The type that the owner's package refuses; the size of the smallest such file is known."""
    t = ((7 * np.arange(256) + np.arange(256) // 5) % 3 - 1).astype(np.int8).reshape(2, 128)
    raw = i2s.from_words2(words2.pack(t), 0.5, 128).tobytes()
    file = read(tmp_path / "a.gguf", gguf_files.by_hand({}, [("w", (2, 128), 36, raw)]))
    info = file.tensors["w"]
    assert (info.kind, info.shape, info.stop) == ("I2_S", (2, 128), info.start + 96)
    assert np.array_equal(i2s.to_words2(file.array("w"), 2, 128, "128")[0], words2.pack(t))


def test_alignment_and_files_without_tensors(tmp_path: Path) -> None:
    for alignment in (8, 64, 4096):
        tensors = [("a", (3,), 0, bytes(12)), ("b", (2,), 0, b"12345678")]
        file = read(tmp_path / "a.gguf", gguf_files.by_hand({"general.alignment": alignment}, tensors, alignment))
        assert file.array("b").tobytes() == b"12345678" and file.alignment == alignment
    assert read(tmp_path / "b.gguf", gguf_files.by_hand({"x": 1}, [])).tensors == {}


def test_a_type_of_unknown_size_is_listed_and_not_read(tmp_path: Path) -> None:
    tensors = [("a", (4, 256), 39, bytes(100)), ("b", (4, 256), 999, bytes(64)), ("c", (2,), 0, bytes(8))]
    file = read(tmp_path / "a.gguf", gguf_files.by_hand({}, tensors))
    assert [str(info) for info in file.tensors.values()] == ["TL2 [4, 256]", "type 999 [4, 256]", "F32 [2]"]
    assert file.tensors["a"].room == 128 and len(file.region("a", 100)) == 100
    with pytest.raises(FormatError, match=r"tensor 'b' is type 999 \[4, 256\]; its size is not known"):
        file.array("b")
    with pytest.raises(FormatError, match="needs 129 bytes; 128 are there"):
        file.region("a", 129)
    with pytest.raises(FormatError, match="holds no tensor 'z'"):
        file.array("z")


SOUND = gguf_files.by_hand({"k": "v"}, [("w", (2, 4), 0, bytes(32)), ("v", (8,), 0, bytes(32))])
F32 = ("w", (8,), 0, bytes(32))
FAULTS: dict[str, tuple[bytes, str]] = {
    "no file": (b"", "has 0 bytes"),
    "another file": (b"PK" + SOUND[2:], r"starts with b'PKUF'"),
    "version 1": (SOUND[:4] + struct.pack("<I", 1) + SOUND[8:], "has version 1"),
    "big endian": (SOUND[:4] + struct.pack(">I", 3) + SOUND[8:], "big-endian"),
    "many tensors": (SOUND[:8] + struct.pack("<Q", 1 << 60) + SOUND[16:], "holds text that is not|needs|dimensions"),
    "many keys": (SOUND[:16] + struct.pack("<Q", 1 << 60) + SOUND[24:], "metadata key"),
    "key twice": (SOUND[:16] + struct.pack("<Q", 2) + 2 * (gguf_files.text("k") + gguf_files.value(1)), "'k' is there twice"),
    "long text": (SOUND[:24] + gguf_files.text("k") + struct.pack("<IQ", 8, 1 << 62), "metadata key 'k' needs"),
    "many texts": (
        SOUND[:24] + gguf_files.text("k") + struct.pack("<IIQ", 9, 8, 1 << 61), "'k' has 2305843009213693952 texts",
    ),
    "cut texts": (
        SOUND[:24] + gguf_files.text("k") + struct.pack("<IIQ", 9, 8, 2) + gguf_files.text("ab") + bytes(7),
        "'k' needs text 1 of 2",
    ),
    "texts not UTF-8": (
        SOUND[:24] + gguf_files.text("k") + struct.pack("<IIQ", 9, 8, 1) + gguf_files.text(b"\xff") + bytes(8),
        "'k' holds text that is not UTF-8",
    ),
    "many numbers": (SOUND[:24] + gguf_files.text("k") + struct.pack("<IIQ", 9, 4, 1 << 61), "'k' needs"),
    "value type": (SOUND[:24] + gguf_files.text("k") + struct.pack("<IQ", 13, 0), "'k' has the value type 13"),
    "array of arrays": (SOUND[:24] + gguf_files.text("k") + struct.pack("<IIQ", 9, 9, 1), "'k' has the value type 9"),
    "boolean": (SOUND[:24] + gguf_files.text("k") + struct.pack("<IB", 7, 2), "'k' holds a boolean"),
    "not UTF-8": (gguf_files.by_hand({"k": "v"}, [F32]).replace(b"\x01\0\0\0\0\0\0\0v", b"\x01\0\0\0\0\0\0\0\xff"), "UTF-8"),
    "alignment": (gguf_files.by_hand({"general.alignment": 24}, [F32]), "general.alignment is 24"),
    "dimensions": (gguf_files.by_hand({}, [("w", (1, 1, 2, 2, 2), 0, bytes(32))]), "'w' has 5 dimensions"),
    "empty": (gguf_files.by_hand({}, [("w", (2, 0), 0, b"")]), r"'w' has shape \[2, 0\]"),
    "huge": (gguf_files.by_hand({}, [("w", (1 << 40, 1 << 40), 0, bytes(32))]), "at most 2\\^48"),
    "name twice": (gguf_files.by_hand({}, [F32, F32]), "tensor 'w' is there twice"),
    "short": (SOUND[:-1], "'v' is F32 \\[8\\] and takes 32 bytes; it has 31 up to the end"),
    "cut": (SOUND[:-40], "starts at 32 of 24 bytes"),
    "long": (SOUND + bytes(32), "takes 32 bytes; it has 64 up to the end"),
    "overlap": (gguf_files.by_hand({}, [("w", (9,), 0, bytes(32)), ("v", (8,), 0, bytes(32))]), "'w' .* it has 32 up to the next"),
    "hole": (gguf_files.by_hand({}, [("w", (8,), 0, bytes(96)), ("v", (8,), 0, bytes(32))]), "'w' .* it has 96 up to the next"),
    "one place": (gguf_files.by_hand({}, [("w", (8,), 0, b""), ("v", (8,), 0, bytes(32))]), "'w' and 'v' lie in one place"),
    "between": (
        gguf_files.by_hand({"general.alignment": 64}, [F32, ("v", (8,), 0, bytes(96))]), "'v' starts at 32 .* a multiple of 64",
    ),
    "rows": (gguf_files.by_hand({}, [("w", (2, 100), 35, bytes(96))]), "tensor 'w' in .* needs a multiple of 256"),
    "I2_S as llama.cpp's old type": (gguf_files.by_hand({}, [("w", (2, 128), 36, bytes(144))]), "means something else"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_damage_is_refused_by_name(tmp_path: Path, fault: str) -> None:
    data, message = FAULTS[fault]
    with pytest.raises((FormatError, UnsupportedModelError), match=message) as caught:
        read(tmp_path / "a.gguf", data)
    assert "a.gguf" in str(caught.value)


@settings(deadline=None, max_examples=150, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, len(SOUND) - 1), st.integers(0, 255), st.booleans())
def test_no_byte_makes_it_fail_in_another_way(tmp_path: Path, at: int, byte: int, cut: bool) -> None:
    data = SOUND[:at] if cut else SOUND[:at] + bytes([byte]) + SOUND[at + 1 :]
    try:
        file = read(tmp_path / f"{cut}{at}-{byte}.gguf", data)
        for name, info in file.tensors.items():
            assert info.stop is None or len(file.array(name)) == info.stop - info.start
    except BitnetError:
        pass


def test_which_paths_are_gguf_files(tmp_path: Path) -> None:
    """A file of a cache has no ending; then its first bytes tell."""
    for name, data, expected in (
        ("a.GGUF", b"", True), ("b", SOUND, True), ("c", b"PK\3\4", False), ("d.bin", SOUND, False),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(data)
        assert is_gguf(tmp_path / name) == expected, name
    (tmp_path / "folder.gguf").mkdir()
    assert not is_gguf(tmp_path / "folder.gguf") and not is_gguf(tmp_path / "none.gguf")


def test_q2_0_tensors_too_small_to_tell_their_groups(tmp_path: Path) -> None:
    file = read(tmp_path / "a.gguf", gguf_files.by_hand({}, [("w", (1, 128), 42, bytes(34))]))
    with pytest.raises(FormatError, match="too small to tell groups of 64 from groups of 128"):
        q2_group(file)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot be read"):
        GgufFile(tmp_path / "none.gguf")
