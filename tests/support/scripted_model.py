"""A decoder that wants to write one text, whatever it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from bitnet_mlx.models.cache import KVCache
from bitnet_mlx.models.decoder_numpy import NumpyDecoder
from bitnet_mlx.tokenizer import Tokenizer
from tests.support.random_model import random_weights, tiny_config


class ScriptedDecoder(NumpyDecoder):
    """After a prompt (of two tokens or more in its last step) the text's tokens are the most likely, one after the other, and
    then the end's. The other tokens' logits are a random model's, so that a grammar can have it otherwise.
    """

    def __init__(self, tokenizer: Tokenizer, text: str = "", **changes: Any) -> None:
        end = tokenizer.eos_token_id
        options = {"vocab_size": tokenizer.vocab_size, "eos_token_ids": (end,), "num_hidden_layers": 1, **changes}
        super().__init__(random_weights(tiny_config(**options), seed=1))
        self._tokenizer, self._end = tokenizer, end
        self._begun: dict[int, tuple[KVCache, int]] = {}  # where each cache's prompt ended
        self.text = text

    def step(
        self, tokens: Sequence[Sequence[int]], caches: Sequence[KVCache], logits: Literal["last", "all"] = "last"
    ) -> list[np.ndarray]:
        rows = super().step(tokens, caches, logits)
        script = [*self._tokenizer.encode(self.text, add_special_tokens=False), self._end]
        for fed, cache, row in zip(tokens, caches, rows, strict=True):
            if len(fed) > 1:
                self._begun[id(cache)] = cache, cache.offset
            at = cache.offset - self._begun[id(cache)][1]
            row[..., script[min(at, len(script) - 1)]] += 1000
        return rows
