"""bitnet-mlx convert as a user types it: each format is written, told, and runs."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bitnet_mlx.cli.main import main
from tests.support import hf_folder, tiny_tokenizers

WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": 421}
FORMATS = ("words2", "trits5", "hf", "gguf-tq1_0", "gguf-tq2_0", "mlx-2bit")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("convert") / "model"
    hf_folder.write(folder, "llama", "online", **WIDE)
    return tiny_tokenizers.byte_level(folder)


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_written_runs(model: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / ("m.gguf" if kind.startswith("gguf") else "m")
    assert run("convert", "--hf-path", model, "--mlx-path", out, "--format", kind, "--json") == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {
        "tensors", "ternary_parameters", "parameters", "bits_per_weight", "bytes_in", "bytes_out", "seconds",
        "peak_memory_bytes", "verified",
    } <= record.keys()  # fmt: skip
    assert record["verified"] is True and record["path"] == str(out) and record["peak_memory_bytes"] > 10_000_000
    bits = {"words2": 2.0, "trits5": 1.6, "hf": 2.0, "gguf-tq1_0": 1.6875, "gguf-tq2_0": 2.0625, "mlx-2bit": 2.25}
    assert record["bits_per_weight"] == pytest.approx(bits[kind], abs=0.03)
    assert (
        run("generate", "--model", out, "--prompt", "hello", "--max-tokens", "4", "--backend", "numpy", "--json") == 0
    )
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["generation_tokens"] > 0
    assert run("inspect", out, "--json") == 0


def test_what_people_are_told(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("convert", "--hf-path", model, "--mlx-path", tmp_path / "m", "--verbose") == 0
    text = capsys.readouterr().out
    assert "note: embedding and head are written in 8 bits; --head-bits 16 keeps them as they are" in text
    assert re.search(r"model\.layers\.1\.mlp\.down_proj +zeros \d+\.\d+%, scale 0\.\d+, relative error \d+\.\d+%", text)
    assert "all of them read again and equal to the source" in text and "peak memory" in text
    assert run("convert", "--hf-path", model, "--mlx-path", tmp_path / "m") == 2
    assert "--force" in capsys.readouterr().err
    assert run("convert", "--hf-path", model, "--mlx-path", tmp_path / "m", "--force") == 0


def test_a_bar_is_drawn_on_a_terminal_alone(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bitnet_mlx", "convert", "--hf-path", str(model), "--mlx-path"]
    ours, theirs = pty.openpty()
    child = subprocess.Popen([*command, str(tmp_path / "a")], stderr=theirs, stdout=subprocess.PIPE)
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        shown += part
    child.communicate()
    os.close(ours)
    assert child.returncode == 0 and b"converting" in shown
    done = subprocess.run([*command, str(tmp_path / "b")], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_precision_sets_what_is_not_given(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def head(*options: str) -> tuple[int, str]:
        assert run("convert", "--hf-path", model, "--mlx-path", tmp_path / "m", "--force", "--json", *options) == 0
        capsys.readouterr()
        config = json.loads((tmp_path / "m" / "config.json").read_text(encoding="utf-8"))
        assert run("inspect", tmp_path / "m", "--json") == 0
        stored = json.loads(capsys.readouterr().out.splitlines()[-1])["head_storage"]
        return config["quantization_config"]["head_bits"], stored

    assert head("--precision", "memory") == (4, "4 bits in groups of 64")
    assert head("--precision", "balanced") == (8, "8 bits in groups of 64")
    assert head("--precision", "memory", "--head-bits", "6") == (6, "6 bits in groups of 64")
    assert head("--precision", "accuracy") == (16, "F32")


def test_options_reach_the_conversion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Float weights taken for masters, and inputs that stay floats."""
    floats = tmp_path / "floats"
    hf_folder.write(floats, "llama", "dense", **WIDE)
    tiny_tokenizers.byte_level(floats)

    def activations(*options: str) -> int | None:
        assert run("convert", "--hf-path", floats, "--mlx-path", tmp_path / "m", "--force", "--json", *options) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["ternary_parameters"] > 0
        config = json.loads((tmp_path / "m" / "config.json").read_text(encoding="utf-8"))
        return config["quantization_config"]["activation_bits"]

    assert activations("--ternarize") == 8
    assert activations("--ternarize", "--activations", "16") == 16
