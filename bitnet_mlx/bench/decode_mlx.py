"""Decoding as a generator on a GPU does it: the next step is under way before the last token is looked at."""

from __future__ import annotations

import time
from typing import Any

from bitnet_mlx.backends.mlx_import import mx
from bitnet_mlx.bench.plain_mlx import PlainModel
from bitnet_mlx.models.decoder_mlx import MlxModel

_PIECE = 512  # tokens of one pass over a prompt


class MlxContender:
    """One model and one sequence's cache."""

    def __init__(self, model: MlxModel | PlainModel) -> None:
        self._model = model
        self._cache: Any = model.make_cache()
        self._next = mx.array([[0]])

    def prefill(self, tokens: list[int]) -> float:
        """Seconds for a prompt from an empty cache, until its next token is known."""
        self._cache = self._model.make_cache()
        inputs = mx.array([tokens])
        mx.eval(inputs)
        mx.synchronize()
        start = time.perf_counter()
        for at in range(0, len(tokens), _PIECE):
            self._next = self._step(inputs[:, at : at + _PIECE])
            mx.eval(self._next, [entry.state for entry in self._cache])
        return time.perf_counter() - start

    def decode(self, count: int) -> float:
        """Seconds for each of `count` tokens behind those that the cache holds, the likeliest each time."""
        token = self._next
        start = time.perf_counter()
        for _ in range(count):
            following = self._step(token)
            mx.async_eval(following)
            token.item()  # what a generator would print meanwhile
            token = following
        token.item()
        seconds = (time.perf_counter() - start) / count
        self._next = token
        return seconds

    def _step(self, tokens: mx.array) -> mx.array:
        """[1, L] -> the likeliest next token, [1, 1]."""
        model = self._model
        if isinstance(model, PlainModel):
            return model(tokens, self._cache).argmax(axis=-1)
        return model.head(model.model(tokens, self._cache, None)[:, -1:]).argmax(axis=-1)


def device() -> dict[str, object]:
    """What MLX computes on."""
    info = mx.device_info() if mx.default_device() == mx.gpu else {}
    named = {key: info[key] for key in ("device_name", "architecture", "memory_size") if key in info}
    return {"device": str(mx.default_device()), **named}
