"""A small model for the benchmarks' own tests, and faults to plant in its decoders."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bitnet_mlx.api import make_decoder
from bitnet_mlx.bench.decode import DecodeOptions
from bitnet_mlx.models.decoder import Decoder
from bitnet_mlx.models.weights import DecoderWeights
from tests.support.random_model import random_weights, tiny_config

OPTIONS = DecodeOptions(prompt=12, tokens=6, repeats=3)
ENGINES = ["numpy", "cpu", "mlx"]
LONG = 0.08  # seconds: far more than a token of this model takes on any machine


def weights() -> DecoderWeights:
    return random_weights(tiny_config(), seed=3, head="8")


class Faulty:
    """A decoder whose steps do something besides. before: called with the number of the step and its tokens."""

    def __init__(self, decoder: Decoder, before: Callable[[int, Sequence[Sequence[int]]], None]) -> None:
        self._decoder, self._before, self._steps = decoder, before, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def step(self, tokens: Sequence[Sequence[int]], caches: Sequence[Any], logits: Any = "last") -> list[np.ndarray]:
        self._steps += 1
        self._before(self._steps, tokens)
        return self._decoder.step(tokens, caches, logits)


def maker(
    held: DecoderWeights, faulty: str = "", before: Callable[[int, Sequence[Sequence[int]]], None] | None = None
) -> Callable[[str], Any]:
    """Makes decoders; that of `faulty` has the fault."""

    def make(name: str) -> Any:
        decoder = make_decoder(name, held)
        return Faulty(decoder, before) if before is not None and name == faulty else decoder

    return make


def sleeps(_step: int, _tokens: Sequence[Sequence[int]]) -> None:
    time.sleep(LONG)


def stalls(step: int, _tokens: Sequence[Sequence[int]]) -> None:
    """Every third step."""
    if step % 3 == 0:
        time.sleep(LONG)


class Leak:
    """Keeps an array a step."""

    def __init__(self, size: int = 1 << 14) -> None:
        self.kept: list[np.ndarray] = []
        self.size = size

    def __call__(self, _step: int, _tokens: Sequence[Sequence[int]]) -> None:
        self.kept.append(np.ones(self.size, np.uint8))


def copies(_step: int, _tokens: Sequence[Sequence[int]]) -> None:
    """A few megabytes, gone again when the step begins."""
    np.ones(1 << 19).sum()
