"""The disk that a conversion asks for before it begins: what it takes, and little more."""

from __future__ import annotations

import shutil
from collections import namedtuple
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from bitnet_mlx import convert
from bitnet_mlx.checkpoint.convert import SPARE, room
from bitnet_mlx.checkpoint.read import read_weights
from bitnet_mlx.errors import MemoryLimitError
from tests.support import hf_folder


@pytest.mark.parametrize(
    ("kind", "chosen", "tied"),
    [
        ("words2", {}, False), ("words2", {"head_bits": 4}, True), ("trits5", {"head_bits": 16}, False), ("hf", {}, False),
        ("hf", {"dtype": "float32"}, True), ("hf-float", {}, True), ("hf-float", {"dtype": "bfloat16"}, False),
        ("mlx-2bit", {}, False), ("mlx-2bit", {"dtype": "float32", "head_bits": 4}, True),
    ],
)  # fmt: skip
def test_what_is_asked_for_is_what_is_taken(tmp_path: Path, kind: str, chosen: dict[str, Any], tied: bool) -> None:
    """Neither a full disk half way, nor a refusal where there is room."""
    size = {"hidden_size": 192, "intermediate_size": 448, "head_dim": 48, "vocab_size": 2000}
    wrote = hf_folder.write(tmp_path / "source", "llama", **size, tie_word_embeddings=tied)
    took = convert(wrote.path, tmp_path / "out", kind, **chosen).bytes_out
    asked = room(read_weights(wrote.path), kind, chosen.get("head_bits"), chosen.get("dtype")) - SPARE
    assert 0.97 * took < asked < 1.25 * took


def test_layers_that_are_kept_as_floats_need_their_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrote = hf_folder.write(tmp_path / "source", "llama", "online")
    keep = [f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1)]
    asked = room(read_weights(wrote.path), "words2", None, None, len(keep))
    assert asked - room(read_weights(wrote.path), "words2", None) >= 2 * 4 * 72 * 100
    usage = namedtuple("usage", "total used free")
    for free, enough in ((asked - 1, False), (asked, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage(10**12, 10**12 - free, free))
        with nullcontext() if enough else pytest.raises(MemoryLimitError, match="GB free"):
            convert(wrote.path, tmp_path / "out", keep=keep)
