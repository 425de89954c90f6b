"""One folder of each kind of tokenizer a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitnet_mlx.tokenizer import Tokenizer, load_tokenizer
from tests.support import tiny_tokenizers as tiny

KINDS = ("byte_level", "byte_level_no_bos", "fallback_json", "sp_fallback", "sp_legacy", "sp_no_fallback", "sp_unigram")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    chat = {"chat_template": tiny.CHAT}
    return {
        "byte_level": tiny.byte_level(root / "byte_level", settings=chat),
        "byte_level_no_bos": tiny.byte_level(root / "byte_level_no_bos", bos=False),
        "fallback_json": tiny.fallback_json(root / "fallback_json"),
        "sp_fallback": tiny.sentencepiece_model(root / "sp_fallback"),
        "sp_legacy": tiny.sentencepiece_model(root / "sp_legacy", settings={"legacy": True}),
        "sp_no_fallback": tiny.sentencepiece_model(root / "sp_no_fallback", byte_fallback=False),
        "sp_unigram": tiny.sentencepiece_model(root / "sp_unigram", byte_fallback=False, model_type="unigram"),
    }


@pytest.fixture(scope="session")
def tokenizers(folders: dict[str, Path]) -> dict[str, Tokenizer]:
    return {kind: load_tokenizer(folder) for kind, folder in folders.items()}
