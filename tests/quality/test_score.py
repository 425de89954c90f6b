"""Scores against distributions that can be done by hand, and against a sum over one plain pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitnet_mlx.errors import ConfigError
from bitnet_mlx.models.decoder_numpy import NumpyDecoder
from bitnet_mlx.quality.score import perplexity, score
from bitnet_mlx.quality.texts import read_text
from bitnet_mlx.tokenizer import load_tokenizer
from tests.support.random_model import random_weights, tiny_config
from tests.support.tiny_tokenizers import byte_level


class Always:
    """A decoder whose next token has the same distribution, whatever came before."""

    name = "always"

    def __init__(self, *probabilities: float) -> None:
        self.config = tiny_config(vocab_size=len(probabilities))
        self.row = np.log(np.asarray(probabilities, np.float32)) + np.float32(3)  # logits are known up to a constant

    def make_cache(self, limit: int | None = None) -> Any:
        return limit

    def step(self, tokens: Sequence[Sequence[int]], caches: Sequence[Any], logits: str = "last") -> list[np.ndarray]:
        return [np.tile(self.row, (len(tokens[0]), 1))]


def test_figures_of_known_distributions() -> None:
    model, teacher = Always(0.5, 0.25, 0.25), Always(0.25, 0.5, 0.25)
    found = score(model, [2, 0, 1, 0, 0], 8, 4, 2, teacher).record()
    bits = 1 + 2 + 1 + 1
    assert found["tokens"] == 4 and found["bytes"] == 8
    assert found["bits_per_byte"] == pytest.approx(bits / 8, rel=1e-6)
    assert found["perplexity"] == pytest.approx(2 ** (bits / 4), rel=1e-6)
    assert found["teacher_bits_per_byte"] == pytest.approx((2 + 1 + 2 + 2) / 8, rel=1e-6)
    assert found["kl"] == pytest.approx(0.25 * math.log(2), rel=1e-6)  # 0.25 ln(0.25/0.5) + 0.5 ln(0.5/0.25)
    assert found["top1_agreement"] == 0
    assert score(model, [2, 0, 1], 2, 4, 2, model).record()["top1_agreement"] == 1
    assert perplexity(1e6) < math.inf


@pytest.mark.parametrize(("length", "stride"), [(300, 1), (299, 150), (64, 64), (64, 5)])
def test_every_token_counts_once(length: int, stride: int) -> None:
    model, teacher = Always(0.5, 0.25, 0.25), Always(0.25, 0.5, 0.25)
    ids = np.random.default_rng(0).integers(0, 3, 300).tolist()
    found = score(model, ids, 1, length, stride, teacher)
    assert found.tokens == 299 and found.kl == pytest.approx(299 * 0.25 * math.log(2), rel=1e-5)
    assert found.nats == pytest.approx(sum(math.log(2 if i == 0 else 4) for i in ids[1:]), rel=1e-5)


def test_a_real_decoder_against_one_pass() -> None:
    first, second = (NumpyDecoder(random_weights(tiny_config(), seed=seed)) for seed in (0, 1))
    ids = np.random.default_rng(1).integers(0, 67, 150)
    p, q = (_probabilities(decoder, ids[:-1]) for decoder in (second, first))
    told: list[int] = []
    found = score(first, ids.tolist(), 200, 150, 75, second, lambda done, total: told.append(done * 1000 // total))
    assert found.kl == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-6)
    assert found.nats == pytest.approx(-float(np.log(q[np.arange(149), ids[1:]]).sum()), rel=1e-6)
    assert found.agreed == int((p.argmax(1) == q.argmax(1)).sum()) and told == [1000]


def _probabilities(decoder: NumpyDecoder, ids: np.ndarray) -> np.ndarray:
    [logits] = decoder.step([ids.tolist()], [decoder.make_cache()], "all")
    e = np.exp(logits.astype(np.float64) - logits.max())
    return e / e.sum(axis=1, keepdims=True)


def test_a_teacher_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match="knows 2 tokens, the model 3"):
        score(Always(0.5, 0.25, 0.25), [0, 1], 1, 4, 2, Always(0.5, 0.5))


@pytest.mark.parametrize("begins", [True, False])
def test_bytes_are_of_the_tokens_that_are_scored(begins: bool, tmp_path: Path) -> None:
    """All but the first; a token that stands for no text has none."""
    tokenizer = load_tokenizer(byte_level(tmp_path / "m", bos=begins))
    text = "naïve café, hello world"
    (tmp_path / "a.txt").write_text(text, "utf-8")
    ids = tokenizer.encode(text)
    for limit, count in ((None, len(ids)), (2, 3)):
        found = read_text(tmp_path / "a.txt", tokenizer, limit)
        pieces = [tokenizer.pieces[i] for i in ids[1:count]]
        assert list(found.ids) == ids[:count] and found.nbytes == sum(len(p) for p in pieces)
    whole = read_text(tmp_path / "a.txt", tokenizer).nbytes
    assert whole == len(text.encode()) - (0 if begins else len(tokenizer.pieces[ids[0]]))
