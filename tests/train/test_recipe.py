"""scripts/train_tiny, as far as it goes without the network and a GPU, and the embedded model's own files."""

from __future__ import annotations

import re
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from bitnet_mlx.api import embedded_model
from bitnet_mlx.checkpoint.read import read_weights
from bitnet_mlx.models.decoder_numpy import NumpyDecoder
from bitnet_mlx.quality.bits import bits_per_byte, total_nats
from bitnet_mlx.ternary import TernaryTensor
from bitnet_mlx.train import tokenizer as bpe
from bitnet_mlx.train.prepare import byte_lengths, vocabulary

ROOT = Path(__file__).resolve().parents[2]
CARD = embedded_model() / "MODEL_CARD.md"
ALLOWED = {"BSD", "BSD-2-Clause", "BSD-3-Clause", "MIT", "Apache-2.0", "PSF-2.0", "PSF-based", "AND", "OR"}


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    loader = SourceFileLoader("train_tiny", str(ROOT / "scripts" / "train_tiny"))
    spec = spec_from_loader("train_tiny", loader)
    assert spec is not None
    module = module_from_spec(spec)
    sys.modules["train_tiny"] = module  # dataclasses look their module up
    loader.exec_module(module)
    return module


def test_packages_are_pinned_and_free(recipe: ModuleType) -> None:
    packages = recipe.packages()
    assert len({p.name for p in packages}) == len(packages) > 40
    assert [p.name for p in packages if p.held_out] == ["click", "marshmallow", "tornado", "Werkzeug"]
    for package in packages:
        assert re.fullmatch(r"\d+(\.\d+)+", package.version), package
        assert set(package.licence.split()) <= ALLOWED, package


def test_only_sources_of_a_package_itself_are_taken(recipe: ModuleType) -> None:
    wanted = recipe.wanted
    assert wanted("pkg/a.py", 10) and wanted("pkg/tests/test_a.py", 200_000)
    assert not any(map(wanted, ("a.pyi", "pkg/_vendor/b.py", "pkg/big.py", "a.py"), (9, 9, 200_001, 0)))


def test_the_card_names_every_package(recipe: ModuleType) -> None:
    card = CARD.read_text("utf-8")
    for package in recipe.packages():
        assert f"| {package.name} {package.version} | {package.licence} |" in card


def test_the_embedded_model_is_small_and_of_the_stated_shape() -> None:
    assert sum(p.stat().st_size for p in embedded_model().iterdir()) <= 5_000_000
    weights = read_weights(embedded_model())
    ternary = [x.weight for x in weights.linears.values()]
    assert all(isinstance(w, TernaryTensor) and w.scale.ndim == 0 for w in ternary)
    assert sum(w.shape[0] * w.shape[1] for w in ternary) == 12_582_912
    assert weights.lm_head is weights.embed_tokens and weights.embed_tokens.shape == (3072, 384)
    assert "12,582,912 ternary" in CARD.read_text("utf-8")


def test_the_embedded_model_predicts_python() -> None:
    """This file, which no one can have trained on, in far fewer bits than a guess of its bytes would need."""
    text = Path(__file__).read_text("utf-8")[:600]
    ids = bpe.encode_documents(bpe.load(embedded_model()), [text])
    lengths = byte_lengths(vocabulary(embedded_model()))
    assert lengths[ids].sum() == len(text.encode())
    nats = total_nats(NumpyDecoder(read_weights(embedded_model())), ids.astype(np.uint16), 512, 256)
    assert bits_per_byte(nats, len(text.encode())) < 2.0
