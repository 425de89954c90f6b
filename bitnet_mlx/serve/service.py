"""A loaded model becomes a server: names, limits and memory are settled here."""

from __future__ import annotations

import math
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitnet_mlx.generation.sampling import SamplingConfig
from bitnet_mlx.generation.stream import check_context
from bitnet_mlx.models.decoder import Decoder
from bitnet_mlx.serve.app import Options, make_app
from bitnet_mlx.serve.budget import kv_budget
from bitnet_mlx.serve.engine import Engine, Limits
from bitnet_mlx.serve.jobs import Model
from bitnet_mlx.serve.pooling import find_pooling
from bitnet_mlx.serve.server import Server
from bitnet_mlx.tokenizer import Tokenizer


@dataclass(frozen=True)
class Service:
    """app: the ASGI application. context: positions of one text. limits: of all texts."""

    name: str
    context: int
    limits: Limits
    app: Any

    def run(self, listening: socket.socket, drain_seconds: float) -> None:
        """Serve on this thread until SIGTERM or SIGINT."""
        Server(self.app, listening, drain_seconds).serve_until_told()


def open_service(
    decoder: Decoder, tokenizer: Tokenizer, model: str | None, options: Options | None = None, *, max_tokens: int = 1024,
    max_kv_size: int | None = None, running: int = 16, waiting: int = 64, kv_bytes: int | None = None,
    prefix_bytes: int | None = None, seconds: float = math.inf, pooling: str | None = None,
) -> Service:  # fmt: skip
    """model: what it was loaded from; a folder is served under its own name, the model in the package as "embedded".
    pooling: of embeddings, "mean", "last" or "none"; None takes what the model's files say.

    kv_bytes, prefix_bytes: as kv_budget takes them. seconds: from a text's arrival to its end. Raises ConfigError where
    kv_bytes has no room for a single position, or generation_config.json holds what is not allowed.
    """
    context = check_context(decoder, max_kv_size)
    SamplingConfig.from_generation_config(tokenizer.generation_config)
    kv_bytes, prefix_bytes = kv_budget(decoder, context, running, kv_bytes, prefix_bytes)
    limits = Limits(running=running, waiting=waiting, kv_bytes=kv_bytes, prefix_bytes=prefix_bytes, seconds=seconds)
    path = Path(model) if model else None
    name = "embedded" if path is None else path.resolve().name if path.exists() else str(model)
    found = find_pooling(tokenizer.name_or_path, pooling)
    served = Model(name, decoder, tokenizer, context, max_tokens, int(time.time()), found)
    return Service(name, context, limits, make_app(served, Engine(decoder, tokenizer, limits), options))
