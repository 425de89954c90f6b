"""What goes in wrong comes out as one message that names what and where, with exit code 1 or 2 and no traceback."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from bitnet_mlx.cli.main import main
from tests.support import gguf_models, hf_folder, tiny_tokenizers

Spoil = Callable[[Path, hf_folder.HFFolder], None]
WEIGHT = "model.layers.1.mlp.up_proj.weight"
SCALE = "model.layers.1.mlp.up_proj.weight_scale"


@pytest.fixture
def folder(tmp_path: Path) -> hf_folder.HFFolder:
    """A sound folder: packed bitnet with a tokenizer."""
    made = hf_folder.write(tmp_path / "model", "bitnet", "packed", vocab_size=420, max_position_embeddings=32)
    made.save()
    tiny_tokenizers.byte_level(made.path)
    return made


def refused(capsys: pytest.CaptureFixture[str], code: int, *words: str, arguments: list[str]) -> None:
    assert main(arguments) == code
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    message = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(message) == 1, err
    assert all(word in err for word in words), err


def generate(path: Path | str, *more: str) -> list[str]:
    return ["generate", "--model", str(path), "--prompt", "hello", "--max-tokens", "2", "--backend", "numpy", *more]


def no_config(path: Path, made: hf_folder.HFFolder) -> None:
    (path / "config.json").unlink()


def unknown_family(path: Path, made: hf_folder.HFFolder) -> None:
    (path / "config.json").write_text(json.dumps({**made.config, "model_type": "mamba"}))


def truncated(path: Path, made: hf_folder.HFFolder) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def lying_header(path: Path, made: hf_folder.HFFolder) -> None:
    file = path / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(struct.pack("<Q", 1 << 40) + data[8:])


def retensor(name: str, change: Callable[[mx.array], mx.array]) -> Spoil:
    def spoil(path: Path, made: hf_folder.HFFolder) -> None:
        made.tensors[name] = change(made.tensors[name])
        made.save()

    return spoil


def code_3(packed: mx.array) -> mx.array:
    codes = np.array(packed)
    codes[3, 5] |= 3
    return mx.array(codes)


CASES: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "folder without config": (no_config, ("config.json",)),
    "unknown family": (unknown_family, ("mamba", "bitnet", "llama")),
    "truncated file": (truncated, ("model.safetensors",)),
    "lying header": (lying_header, ("model.safetensors", "header")),
    "wrong dtype": (retensor(WEIGHT, lambda w: w.astype(mx.int32)), (WEIGHT,)),
    "wrong shape": (retensor(WEIGHT, lambda w: w[:, :-1]), (WEIGHT, "71", "72")),
    "NaN in a scale": (retensor(SCALE, lambda s: s * float("nan")), (SCALE,)),
    "code 3": (retensor(WEIGHT, code_3), (WEIGHT, "3")),
}


@pytest.mark.parametrize("case", list(CASES))
def test_a_damaged_folder(case: str, folder: hf_folder.HFFolder, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, words = CASES[case]
    assert main(generate(folder.path)) == 0  # sound before
    capsys.readouterr()
    spoil(folder.path, folder)
    refused(capsys, 1, *words, arguments=generate(folder.path))


def test_missing_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, 2, "absent", arguments=generate(tmp_path / "absent"))


def test_prompt_longer_than_the_context(folder: hf_folder.HFFolder, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, 2, "32", "context", arguments=generate(folder.path, "--prompt", "hello world " * 40))


def test_no_tokens_asked_for(folder: hf_folder.HFFolder, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, 2, "--max-tokens", "at least 1", arguments=generate(folder.path, "--max-tokens", "0"))


def test_empty_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, 2, "prompt is empty", arguments=["generate", "--prompt", "", "--backend", "numpy"])


def test_stdin_that_is_not_utf8() -> None:
    command = [sys.executable, "-m", "bitnet_mlx", "generate", "--prompt", "-", "--backend", "numpy"]
    done = subprocess.run(command, input=b"caf\xe9 au lait", capture_output=True, check=False)
    assert done.returncode == 2 and done.stdout == b""
    assert b"not UTF-8" in done.stderr and b"position 3" in done.stderr and b"Traceback" not in done.stderr


def test_an_empty_folder_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """That is said before that it has no tokenizer either."""
    refused(capsys, 1, "has no config.json", "it is empty", arguments=generate(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("cache-prompt --prompt x --prompt-cache-file f --max-kv-size -1 --backend numpy", "max_kv_size is -1"),
        ("cache-prompt --prompt x --prompt-cache-file /dev/null", "is a folder or a device"),
        ("cache-prompt --prompt x --prompt-cache-file .", "is a folder or a device"),
        ("calibrate --data f --output /dev/null", "a folder or a device"),
        ("evaluate --data . --backend numpy", "no file ."),
        ("convert --hf-path f --mlx-path out", "f is a file; a folder with config.json"),
        ("bench decode --record .", "is a folder, or lies in one"), ("bench decode --record no/x", "lies in one that is not"),
        ("generate --prompt x --profile .", "is a folder"),
        ("train --data f --output out --intermediate-size -1", "--intermediate-size is -1"),
        ("train --data f --output out --num-kv-heads -1", "--num-kv-heads is -1"),
        ("generate --prompt x --json-schema {bad", "--json-schema is not valid JSON"),
        ("generate --prompt x --dtype bfloat16 --backend cpu", "float32 alone; leave it out, or take metal"),
        ("calibrate --data absent --backend numpy", "[data] no file absent; --data takes text files"),
        ("bench decode --layers 0", "layers is 0; 1 to"), ("bench decode --layers 99999999999", "layers is 99999999999"),
        ("bench decode --threads 2 --backend numpy", "only cpu takes"),
        ("bench precision --layers 1 --threads 2", "precision does not use --layers, --threads"),
        ("bench matmul --preset small", "matmul does not use --preset"),
        ("bench backends --against stock", "backends does not use --against"),
        ("evaluate --data f --num-fewshot 2", "--num-fewshot without --tasks"),
        ("evaluate --data f --apply-chat-template", "--apply-chat-template without --tasks"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_or_would_do_nothing(
    arguments: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f").write_text("hello")
    refused(capsys, 2, words, arguments=arguments.split())


@pytest.mark.parametrize(
    ("place", "words"), [("", "the name to write under is empty"), ("f/out", "nothing can be made in")]
)
def test_places_that_cannot_be_written(
    place: str,
    words: str,
    folder: hf_folder.HFFolder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder.path.parent)
    (folder.path.parent / "f").write_text("a file, no folder")
    refused(capsys, 2, words, arguments=["convert", "--hf-path", "model", "--mlx-path", place])


def test_a_gguf_file_without_a_vocabulary_is_told_of_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = gguf_models.write(tmp_path / "a.gguf", *gguf_models.small())
    assert main(["inspect", str(file), "--json"]) == 0
    notices = json.loads(capsys.readouterr().out)["notices"]
    assert sum("vocabulary" in text or "tokenizer.json" in text for text in notices) == 1, notices


def test_an_adapter_given_as_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(capsys, 1, "is an adapter; give it as --adapter-path", arguments=generate(tmp_path))
