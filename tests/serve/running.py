"""A server on 127.0.0.1 over a small random model that can be slowed down, watched and made to fail."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from openai import OpenAI

from bitnet_mlx.models.cache import KVCache
from bitnet_mlx.models.decoder_numpy import NumpyDecoder
from bitnet_mlx.serve.app import Options
from bitnet_mlx.serve.server import Server, listen
from bitnet_mlx.serve.service import open_service
from bitnet_mlx.tokenizer import Tokenizer, load_tokenizer
from tests.support import tiny_tokenizers as tiny
from tests.support.random_model import random_weights, tiny_config


class WatchedDecoder(NumpyDecoder):
    """steps: how many tokens each sequence was fed, step by step. Where there is a gate, each step takes a permit of it.
    A sequence that is fed the token `poison` makes the whole step fail.
    """

    def __init__(self, vocab_size: int, **changes: Any) -> None:
        weights = random_weights(tiny_config(vocab_size=vocab_size, **{"eos_token_ids": (), **changes}), seed=1)
        weights.norms["model.norm"] = weights.norms["model.norm"] * np.float32(0.2)  # else one token takes it all
        super().__init__(weights)
        self.steps: list[list[int]] = []
        self.gate: threading.Semaphore | None = None
        self.poison: int | None = None

    def step(
        self, tokens: Sequence[Sequence[int]], caches: Sequence[KVCache], logits: Literal["last", "all"] = "last"
    ) -> list[np.ndarray]:
        if self.gate is not None:
            self.gate.acquire()
        self.steps.append([len(part) for part in tokens])
        if any(self.poison in part for part in tokens):
            super().step(tokens[:1], caches[:1])  # some caches have moved on when it fails
            raise RuntimeError("poisoned")
        return super().step(tokens, caches, logits)


def model(folder: Path, template: str | None = tiny.CHAT, **changes: Any) -> tuple[WatchedDecoder, Tokenizer]:
    settings = {"eos_token": None} if template is None else {"chat_template": template}
    tokenizer = load_tokenizer(tiny.byte_level(folder, settings=settings))
    return WatchedDecoder(tokenizer.vocab_size, **changes), tokenizer


@dataclass
class Running:
    url: str
    decoder: WatchedDecoder
    tokenizer: Tokenizer

    def client(self, **options: Any) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, "timeout": 30, **options})


@contextmanager
def serving(decoder: Any, tokenizer: Tokenizer, options: Options | None = None, **settings: Any) -> Iterator[Running]:
    """The server runs on a thread of its own, and is asked to end as SIGTERM asks it."""
    head_seconds = settings.pop("head_seconds", 20)
    service = open_service(decoder, tokenizer, "test/model", options, **settings)
    with listen("127.0.0.1", 0) as listening:
        server = Server(service.app, listening, drain_seconds=20, head_seconds=head_seconds)
        thread = threading.Thread(target=server.serve_until_told)
        thread.start()
        try:
            yield Running(f"http://127.0.0.1:{listening.getsockname()[1]}", decoder, tokenizer)
        finally:
            gate = getattr(decoder, "gate", None)
            if gate is not None:
                gate.release(100_000)
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive(), "the server did not end"


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for something that another thread brings about."""
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError(f"after 10 s: {what}")
