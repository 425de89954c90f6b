"""A small random model in the place of the one that a command loads."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest

import bitnet_mlx
from bitnet_mlx.tokenizer import Tokenizer
from tests.support.tiny_chat_model import RecordingDecoder, pair


class Given:
    """Call it to choose the model that `load` gives, and what stdin holds. asked: what `load` was given since then."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder, self._patch = folder, monkeypatch
        self.asked: list[tuple[Any, dict[str, Any]]] = []

    def __call__(
        self, stdin: bytes = b"", template: str | None = None, generation: Any = None
    ) -> tuple[RecordingDecoder, Tokenizer]:
        decoder, tokenizer = pair(self._folder, template=template, max_position_embeddings=400)
        tokenizer.generation_config = generation or {}
        self.asked.clear()

        def load(path: Any = None, backend: str = "auto", **options: Any) -> tuple[RecordingDecoder, Tokenizer]:
            self.asked.append((path, {"backend": backend, **options}))
            return decoder, tokenizer

        self._patch.setattr(bitnet_mlx, "load", load, raising=False)
        self._patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        return decoder, tokenizer


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Given:
    return Given(tmp_path / "model", monkeypatch)
