"""A loaded model becomes a server: names, limits and memory are settled here."""

from __future__ import annotations

import math
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitnet_mlx.errors import ConfigError
from bitnet_mlx.generation.sampling import SamplingConfig
from bitnet_mlx.generation.stream import check_context
from bitnet_mlx.memory import system
from bitnet_mlx.models.decoder import Decoder
from bitnet_mlx.serve.app import Options, make_app
from bitnet_mlx.serve.engine import Engine, Limits
from bitnet_mlx.serve.jobs import Model
from bitnet_mlx.serve.pooling import find_pooling
from bitnet_mlx.serve.server import Server
from bitnet_mlx.tokenizer import Tokenizer

_SHARE = 0.25  # of the memory that is available, for keys and values


@dataclass(frozen=True)
class Service:
    """app: the ASGI application. context: positions of one text. kv_positions: of all texts that run."""

    name: str
    context: int
    kv_positions: int
    app: Any

    def run(self, listening: socket.socket, drain_seconds: float) -> None:
        """Serve on this thread until SIGTERM or SIGINT."""
        Server(self.app, listening, drain_seconds).serve_until_told()


def open_service(
    decoder: Decoder, tokenizer: Tokenizer, model: str | None, options: Options | None = None, *, max_tokens: int = 1024,
    max_kv_size: int | None = None, running: int = 16, waiting: int = 64, kv_gib: float | None = None,
    pooling: str | None = None,
) -> Service:  # fmt: skip
    """model: what it was loaded from; a folder is served under its own name, the model in the package as "embedded".
    pooling: of embeddings, "mean", "last" or "none"; None takes what the model's files say.

    Raises ConfigError where kv_gib has no room for a single token, or generation_config.json holds what is not allowed.
    """
    context = check_context(decoder, max_kv_size)
    SamplingConfig.from_generation_config(tokenizer.generation_config)
    positions = _positions(decoder, kv_gib, context * running)
    path = Path(model) if model else None
    name = "embedded" if path is None else path.resolve().name if path.exists() else str(model)
    engine = Engine(decoder, tokenizer, Limits(running=running, waiting=waiting, kv_positions=positions))
    found = find_pooling(tokenizer.name_or_path, pooling)
    served = Model(name, decoder, tokenizer, context, max_tokens, int(time.time()), found)
    return Service(name, context, positions, make_app(served, engine, options))


def _positions(decoder: Decoder, kv_gib: float | None, most: int) -> int:
    """Cache positions that the memory for keys and values holds, no more than can come to be used."""
    if kv_gib is not None and not (math.isfinite(kv_gib) and kv_gib > 0):
        raise ConfigError(f"[serve] --kv-memory is {kv_gib}; a number of GiB above 0 is allowed")
    free = system.available_bytes() or system.total_bytes()
    room = None if kv_gib is None else int(kv_gib * (1 << 30))
    if room is None:
        if not free:
            return most
        room = int(free * _SHARE)
    config = decoder.config
    each = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    if room < each:
        raise ConfigError(f"[serve] --kv-memory has room for no position: one takes {each} bytes; give more")
    return min(most, room // each)
