"""A random decoder that shares its vocabulary with a tokenizer trained on the spot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bitnet_mlx.models.cache import KVCache
from bitnet_mlx.models.decoder_numpy import NumpyDecoder
from bitnet_mlx.tokenizer import Tokenizer, load_tokenizer
from tests.support import tiny_tokenizers as tiny
from tests.support.random_model import random_weights, tiny_config


class RecordingDecoder(NumpyDecoder):
    """The numpy decoder; `fed` lists the tokens of each step, and step number `interrupt_at` is interrupted."""

    def __init__(self, vocab_size: int, seed: int = 1, **changes: Any) -> None:
        options: dict[str, Any] = {"vocab_size": vocab_size, "eos_token_ids": (), **changes}
        super().__init__(random_weights(tiny_config(**options), seed=seed))
        self.fed: list[list[int]] = []
        self.interrupt_at: int | None = None

    def step(
        self, tokens: Sequence[Sequence[int]], caches: Sequence[KVCache], logits: Literal["last", "all"] = "last"
    ) -> list[np.ndarray]:
        self.fed.append(list(tokens[0]))
        if len(self.fed) == self.interrupt_at:
            raise KeyboardInterrupt
        return super().step(tokens, caches, logits)


def pair(
    folder: Path, template: str | None = tiny.CHAT, bos: bool = True, **changes: Any
) -> tuple[RecordingDecoder, Tokenizer]:
    """(decoder, tokenizer). The random model never ends by itself, unless its eos ids are given."""
    settings = {"eos_token": None} if template is None else {"chat_template": template}
    tokenizer = load_tokenizer(tiny.byte_level(folder, bos=bos, settings=settings))
    return RecordingDecoder(tokenizer.vocab_size, **changes), tokenizer
