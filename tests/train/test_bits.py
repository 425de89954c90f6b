"""Bits per byte, against cases that can be done by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from bitnet_mlx.errors import ConfigError
from bitnet_mlx.models.decoder_numpy import NumpyDecoder
from bitnet_mlx.quality.bits import bits_per_byte, negative_log_likelihood, total_nats, windows
from tests.support.random_model import random_weights, tiny_config


class Guess:
    """A decoder that gives the last token it saw probability 1/2 to come again, and shares the rest among 4 others."""

    name, config = "guess", tiny_config(vocab_size=5)

    def make_cache(self, limit: int | None = None) -> Any:
        return limit

    def step(self, tokens: Sequence[Sequence[int]], caches: Sequence[Any], logits: str = "last") -> list[np.ndarray]:
        [ids], [limit] = tokens, caches
        assert logits == "all" and len(ids) <= limit
        rows = np.full((len(ids), 5), math.log(1 / 8), np.float32)
        rows[np.arange(len(ids)), list(ids)] = math.log(1 / 2)
        return [rows + np.float32(3)]  # a constant on all logits changes nothing


def test_by_hand() -> None:
    # Targets 1, 1, 2, 2 after 0, 1, 1, 2: misses 3 bits, hits 1 bit: 3 + 1 + 3 + 1 = 8 bits over 4 bytes.
    nats = total_nats(Guess(), np.array([0, 1, 1, 2, 2], np.uint16), length=2, stride=1)
    assert bits_per_byte(nats, 4) == pytest.approx(2.0, rel=1e-6)


def test_large_logits_do_not_overflow() -> None:
    assert negative_log_likelihood(np.array([[1000.0, 999.0]], np.float32), np.array([1]))[0] == pytest.approx(
        1 + math.log(1 + math.exp(-1))
    )


@pytest.mark.parametrize(("tokens", "length", "stride"), [(2, 8, 4), (9, 8, 4), (10, 8, 8), (57, 8, 3), (64, 8, 1)])
def test_every_target_counts_once(tokens: int, length: int, stride: int) -> None:
    counted: list[int] = []
    for window in windows(tokens, length, stride):
        assert window.stop - window.start == min(length, tokens - 1)
        targets = list(range(window.start + 1, window.stop + 1))[window.skip :]
        assert targets and targets[0] == window.first
        if counted:
            assert targets[0] - window.start > length - stride - 1
        counted += targets
    assert counted == list(range(1, tokens))


def test_a_window_over_everything_equals_one_pass() -> None:
    decoder = NumpyDecoder(random_weights(tiny_config()))
    ids = np.random.default_rng(0).integers(0, 67, 40).astype(np.uint16)
    [logits] = decoder.step([ids[:-1].tolist()], [decoder.make_cache()], "all")
    want = negative_log_likelihood(logits, ids[1:].astype(int)).sum()
    assert total_nats(decoder, ids, 64, 32) == pytest.approx(want, rel=1e-12)


def test_what_cannot_be_measured() -> None:
    for call in (lambda: list(windows(9, 8, 9)), lambda: list(windows(1, 8, 4)), lambda: bits_per_byte(1.0, 0)):
        with pytest.raises(ConfigError, match="bits per byte"):
            call()
