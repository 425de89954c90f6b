"""A clone made without git-lfs: the pointer in the place of a large file is called by its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitnet_mlx.checkpoint.read import read_weights
from bitnet_mlx.errors import FormatError
from bitnet_mlx.tokenizer import load_tokenizer
from tests.support import hf_folder, tiny_tokenizers

# As https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md has it.
POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    "size 12345\n"
)


@pytest.mark.parametrize("file", ["model.safetensors", "model.gguf"])
def test_weights(file: str, tmp_path: Path) -> None:
    hf_folder.write(tmp_path)
    (tmp_path / file).write_text(POINTER)
    with pytest.raises(FormatError, match=rf"{file} is a Git LFS pointer.*git lfs pull"):
        read_weights(tmp_path if file == "model.safetensors" else tmp_path / file)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer.model"])
def test_tokenizers(file: str, tmp_path: Path) -> None:
    make = tiny_tokenizers.byte_level if file == "tokenizer.json" else tiny_tokenizers.sentencepiece_model
    make(tmp_path)
    (tmp_path / file).write_text(POINTER)
    with pytest.raises(FormatError, match=rf"{file} is a Git LFS pointer.*git lfs pull"):
        load_tokenizer(tmp_path)


def test_other_damage_is_none(tmp_path: Path) -> None:
    hf_folder.write(tmp_path)
    (tmp_path / "model.safetensors").write_text("version of something else altogether")
    with pytest.raises(FormatError, match="claims a header"):
        read_weights(tmp_path)
