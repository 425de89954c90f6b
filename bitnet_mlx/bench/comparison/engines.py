"""The engines that take part, all over the same weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bitnet_mlx.api import make_decoder
from bitnet_mlx.backends import NAMES, choose, missing
from bitnet_mlx.models.decoder import Decoder
from bitnet_mlx.models.weights import DecoderWeights

Make = Callable[[str], Decoder]


def present() -> list[str]:
    """Names of the backends that run here."""
    return [name for name in NAMES[1:] if not missing(name)]


def maker(weights: DecoderWeights, dtype: str | None = None, threads: int | None = None) -> Make:
    """Makes a decoder of these weights by a backend's name."""
    return lambda name: make_decoder(name, weights, dtype, threads if name == "cpu" else None)


def auto() -> str:
    """What `--backend auto` takes."""
    return choose("auto").name


def greedy(logits: Any) -> int:
    """The likeliest token."""
    return int(logits.argmax())


class Sequences:
    """So many sequences in one decoder, all at the same position; each step takes one token of each."""

    def __init__(self, decoder: Decoder, count: int, prompt: list[int]) -> None:
        self._decoder = decoder
        self._caches = [decoder.make_cache() for _ in range(count)]
        self._prompt = prompt
        self._next = [0] * count

    def prefill(self) -> None:
        """Each prompt anew."""
        for cache in self._caches:
            cache.trim(0)
        logits = self._decoder.step([self._prompt] * len(self._caches), self._caches)
        self._next = [greedy(x) for x in logits]

    def step(self) -> None:
        """One token of each."""
        logits = self._decoder.step([[token] for token in self._next], self._caches)
        self._next = [greedy(x) for x in logits]


def prompt_ids(count: int, vocabulary: int) -> list[int]:
    """A prompt that is the same everywhere."""
    return [(7 * i + 3) % vocabulary for i in range(count)]


def made(names: list[str], make: Make) -> Mapping[str, Decoder]:
    """One decoder a backend."""
    return {name: make(name) for name in names}
