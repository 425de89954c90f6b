"""convert: streamed, compared with its source, whole or not at all, from what a user types."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitnet_mlx import convert
from bitnet_mlx.checkpoint import masters, pages
from bitnet_mlx.checkpoint.census import take_census
from bitnet_mlx.checkpoint.folder import TOKENIZER_FILES, TensorTable
from bitnet_mlx.checkpoint.read import open_weights, read_weights
from bitnet_mlx.checkpoint.safetensors_file import SafetensorsFile
from bitnet_mlx.checkpoint.safetensors_writer import Pending, pending
from bitnet_mlx.checkpoint.target_native import NativeTarget
from bitnet_mlx.checkpoint.workplace import Workplace
from bitnet_mlx.checkpoint.write import write_folder
from bitnet_mlx.errors import ConfigError, FormatError, MemoryLimitError
from bitnet_mlx.models.weights import Linear
from bitnet_mlx.ternary import ternarize
from bitnet_mlx.tokenizer import load_tokenizer
from tests.support import hf_folder, tiny_tokenizers
from tests.support.same_weights import assert_same

COMMAND = [sys.executable, "-m", "bitnet_mlx", "convert"]


def source(path: Path, storage: str = "packed", **options: Any) -> Path:
    folder = hf_folder.write(path, storage=storage, vocab_size=420, **options).path
    tiny_tokenizers.byte_level(folder)
    (folder / "generation_config.json").write_text('{"temperature": 0.5}\r\n')
    return folder


@pytest.mark.parametrize("storage", ["packed", "inverse", "online"])
@pytest.mark.parametrize("kind", ["words2", "trits5"])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_native_folder_is_its_source(tmp_path: Path, storage: str, kind: str, shards: int) -> None:
    folder = source(tmp_path / "hf", storage, shards=shards)
    done = convert(folder, tmp_path / "out", kind, head_bits=16)
    assert_same(read_weights(tmp_path / "out"), read_weights(folder))
    assert done.verified and done.format == kind and len(done.layers) == 14
    for name in TOKENIZER_FILES:
        if (folder / name).exists():
            assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    again = convert(tmp_path / "out", tmp_path / "again", "words2")  # a head of floats becomes one of 8 bits
    assert_same(read_weights(tmp_path / "again"), read_weights(folder, head_bits=8))
    assert again.notices == ["embedding and head are written in 8 bits; --head-bits 16 keeps them as they are"]


def test_the_report_tells_zeros_scales_and_errors_of_master_weights(tmp_path: Path) -> None:
    wrote = hf_folder.write(tmp_path / "hf", storage="online")
    done = convert(wrote.path, tmp_path / "out")
    for module, layer in done.layers.items():
        w = wrote.floats[f"{module}.weight"]
        t, m = ternarize(w)
        assert layer["zeros"] == (t == 0).mean()
        assert layer["scale_min"] == layer["scale_max"] == float(m)
        error = np.linalg.norm((w - t * m).astype(np.float64)) / np.linalg.norm(w.astype(np.float64))
        assert layer["relative_error"] == pytest.approx(error, rel=1e-6)
    assert done.bytes_in == (wrote.path / "model.safetensors").stat().st_size
    assert done.bytes_out == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert done.parameters == sum(values.size for values in wrote.floats.values())
    assert done.ternary_parameters == 2 * (72 * 72 * 2 + 36 * 72 * 2 + 100 * 72 * 3)


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32"])
def test_every_16_bit_pattern_becomes_the_code_that_the_definition_says(tmp_path: Path, kind: str) -> None:
    """All finite values of the type in one weight, many times the small ones, so that some fall on the threshold."""
    import mlx.core as mx

    bits = np.arange(1 << 16, dtype=np.uint16)
    values = (bits.astype(np.uint32) << 16).view(np.float32) if kind == "bfloat16" else bits.view(np.float16)
    values = values.astype(np.float32)
    values = values[np.isfinite(values) & (np.abs(values) < 8)]
    values = np.resize(values, (200, 400))
    wrote = hf_folder.write(tmp_path, storage="online", hidden_size=400, intermediate_size=200, dtype=getattr(mx, kind))
    name = "model.layers.0.mlp.up_proj"
    wrote.tensors[f"{name}.weight"] = mx.array(values).astype(getattr(mx, kind))
    wrote.save()
    found, error = masters.online(TensorTable(wrote.path), name, (200, 400))
    t, m = ternarize(values)
    assert found.scale == m
    assert np.array_equal(found.rows(slice(None)), t * m)
    wanted = np.linalg.norm(values.astype(np.float64) - t * float(m)) / np.linalg.norm(values.astype(np.float64))
    assert error == pytest.approx(wanted, rel=1e-5)


class WrongBit(NativeTarget):
    """A writer with a fault: one bit of one tensor is not what was to be written."""

    fault = "model.layers.1.mlp.gate_proj.weight"

    def linear(self, module: str, linear: Linear) -> tuple[list[Pending], Linear]:
        tensors, held = super().linear(module, linear)
        return [self._spoil(tensor) for tensor in tensors], held

    def _spoil(self, tensor: Pending) -> Pending:
        if tensor.name != self.fault:
            return tensor
        array = np.concatenate([block.reshape(-1) for block in tensor.blocks()]).reshape(tensor.shape)
        array.reshape(-1).view(np.uint8)[5] ^= 1
        return pending(tensor.name, array)


@pytest.mark.parametrize("fault", ["mlp.gate_proj.weight", "mlp.gate_proj.weight_scale", "mlp.gate_proj.bias"])
def test_one_wrong_bit_is_found_and_nothing_is_kept(tmp_path: Path, fault: str) -> None:
    wrote = hf_folder.write(tmp_path / "hf", "llama", mlp_bias=True, scale_dtype=__import__("mlx.core").core.float32)
    weights = open_weights(wrote.path)
    target = WrongBit(weights, wrote.config)
    target.fault = f"model.layers.1.{fault}"
    with pytest.raises(FormatError, match=r"layers\.1\.mlp\.gate_proj.*(read back differs|code 3)"):  # noqa: SIM117
        with Workplace(tmp_path / "out") as place:
            if fault.endswith("scale"):
                target._spoil = lambda tensor: (  # type: ignore[method-assign]
                    pending(tensor.name, np.float32(next(iter(tensor.blocks()))[()] * np.float32(1.0000001)))
                    if tensor.name == target.fault
                    else tensor
                )
            write_folder(weights, target, place.path)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_head_that_changes_on_the_disk_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitnet_mlx.checkpoint import write

    wrote = hf_folder.write(tmp_path / "hf")
    original = write._compare_bytes

    def spoil_first(file: SafetensorsFile, written: Any) -> None:
        path = file.path
        raw = bytearray(path.read_bytes())
        raw[SafetensorsFile(path).tensors["model.embed_tokens.weight"].start + 100] ^= 1
        path.write_bytes(raw)
        original(SafetensorsFile(path), written)

    monkeypatch.setattr(write, "_compare_bytes", spoil_first)
    with pytest.raises(FormatError, match=r"model\.embed_tokens\.weight read back differs"):
        convert(wrote.path, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_an_existing_model_stays_unless_forced(tmp_path: Path) -> None:
    folder, out = source(tmp_path / "hf"), tmp_path / "out"
    convert(folder, out)
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="exists and is not an empty folder.*--force"):
        convert(folder, out, "trits5")
    assert (out / "model.safetensors").read_bytes() == before
    convert(folder, out, "trits5", force=True)
    assert "trits5" in (out / "config.json").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]


def test_what_force_does_not_replace(tmp_path: Path) -> None:
    folder = source(tmp_path / "models" / "hf")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").write_text("x")
    (tmp_path / "letter.txt").write_text("x")
    for destination, text in (
        (folder, "the model that is read"),
        (tmp_path / "models", "holds, the model"),
        (folder / "inside", "lies inside the model"),
        (tmp_path / "photos", "without config.json"),
        (tmp_path / "letter.txt", "no .gguf"),
    ):
        with pytest.raises(ConfigError, match=text):
            convert(folder, destination, force=True)
    assert (tmp_path / "photos" / "1.jpg").exists() and (folder / "model.safetensors").exists()


def test_another_spelling_of_the_model_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most Macs' disks take Model and model for one name; here samefile alone does."""
    folder = tmp_path / "models" / "Model"
    folder.mkdir(parents=True)
    monkeypatch.setattr(os.path, "samefile", lambda one, other: str(one).lower() == str(other).lower())
    for name in ("model", "MODEL/inside", "../Models"):
        with pytest.raises(ConfigError, match="the model that is read"):
            Workplace(folder.parent / name, True, (folder,))
    Workplace(folder.parent / "model-2", True, (folder,))


def test_a_failed_force_keeps_the_old_model(tmp_path: Path) -> None:
    folder, out = source(tmp_path / "hf"), tmp_path / "out"
    convert(folder, out)
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-5000:] = b"\xff" * 5000
    (folder / "model.safetensors").write_bytes(raw)
    with pytest.raises(FormatError):
        convert(folder, out, force=True)
    assert read_weights(out).config.vocab_size == 420
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    folder = source(tmp_path / "hf")
    with Workplace(tmp_path / "out"), pytest.raises(ConfigError, match="another process is writing"):
        convert(folder, tmp_path / "out")
    convert(folder, tmp_path / "out")


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = source(tmp_path / "hf")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12, 1000))
    with pytest.raises(MemoryLimitError, match=r"out needs about 0\.02 GB and its disk has 0\.00 GB free"):
        convert(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: the system's own refusal in the middle of a write."""
    folder = source(tmp_path / "hf")

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    done = subprocess.run(
        [*COMMAND, "--hf-path", str(folder), "--mlx-path", str(tmp_path / "out")],
        capture_output=True, text=True, preexec_fn=limit, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "is full" in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_what_a_killed_process_left_is_no_part_of_the_model(tmp_path: Path) -> None:
    folder, left = source(tmp_path / "hf"), tmp_path / ".out.converting"
    left.mkdir()
    (left / "model-00002-of-00002.safetensors").write_bytes(b"half")
    convert(folder, tmp_path / "out")
    assert not left.exists() and not list((tmp_path / "out").glob("model-*"))


def test_killed_in_the_middle_and_started_again(tmp_path: Path) -> None:
    folder = source(tmp_path / "hf", "online", hidden_size=512, intermediate_size=2048, num_hidden_layers=12)
    out, work = tmp_path / "out", tmp_path / ".out.converting"
    arguments = [*COMMAND, "--hf-path", str(folder), "--mlx-path", str(out)]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not any(path.stat().st_size > 2_000_000 for path in work.glob(".model*") if path.exists()):
        assert process.poll() is None, "it was to be caught at work"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert work.exists() and not out.exists()
    done = subprocess.run([*arguments, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["verified"]
    assert_same(read_weights(out), read_weights(folder, head_bits=8))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]


def test_killed_between_the_two_renames_of_force(tmp_path: Path) -> None:
    folder, out = source(tmp_path / "hf"), tmp_path / "out"
    convert(folder, out)
    os.replace(out, tmp_path / ".out.replaced")  # as a killed process leaves it
    with pytest.raises(ConfigError, match="exists and is not an empty folder"):
        convert(folder, out)
    assert read_weights(out).config.vocab_size == 420


def test_pages_of_a_file_are_given_back_and_come_again(tmp_path: Path) -> None:
    import mmap

    path = tmp_path / "x"
    path.write_bytes(bytes(range(256)) * 64 * 1024)
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    array = np.frombuffer(mapped, np.uint16, count=(8 << 20) - 32, offset=64).reshape(-1, 8)[100:]

    def resident() -> int:
        if not Path("/proc/self/smaps").exists():  # not Linux: only what is read can be looked at
            return 0
        lines = Path("/proc/self/smaps").read_text().split(str(path))[1].splitlines()
        return int(next(line for line in lines if line.startswith("Rss:")).split()[1]) * 1024

    total = int(array.sum(dtype=np.int64))
    held = resident()
    pages.release(array)
    assert held == 0 or (held > 15 << 20 and resident() < 1 << 20)
    assert int(array.sum(dtype=np.int64)) == total
    pages.release(np.zeros(10))  # memory of its own: nothing to give back


@pytest.mark.parametrize(("bits", "told"), [(8, False), (6, True), (4, True)])
def test_that_fewer_bits_of_a_head_do_not_shrink_the_file_is_told(bits: int, told: bool, tmp_path: Path) -> None:
    hf_folder.write(tmp_path / "hf")
    done = convert(tmp_path / "hf", tmp_path / f"of {bits}", head_bits=bits)
    eight = convert(tmp_path / "hf", tmp_path / "of eight", head_bits=8)
    assert (done.bytes_out == eight.bytes_out) and any("a byte a value" in text for text in done.notices) == told


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer.model", "spiece.model"])
def test_whatever_tokenizer_there_is_goes_along(file: str, tmp_path: Path) -> None:
    hf_folder.write(tmp_path / "hf")
    make = tiny_tokenizers.byte_level if file == "tokenizer.json" else tiny_tokenizers.sentencepiece_model
    make(tmp_path / "hf", **({} if file == "tokenizer.json" else {"name": file}))
    done = convert(tmp_path / "hf", tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").encode("hello") == load_tokenizer(tmp_path / "hf").encode("hello")
    assert not any("no tokenizer" in text for text in done.notices)
    assert take_census(tmp_path / "out").tokenizer is not None


def test_a_model_without_a_tokenizer_is_told_of(tmp_path: Path) -> None:
    hf_folder.write(tmp_path / "hf")
    assert "hf has no tokenizer, so what is written has none" in convert(tmp_path / "hf", tmp_path / "out").notices[-1]
