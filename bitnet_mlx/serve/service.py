"""A loaded model becomes a server: names, limits and memory are settled here."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitnet_mlx.errors import ConfigError
from bitnet_mlx.generation.sampling import SamplingConfig
from bitnet_mlx.generation.speculation import Speculation
from bitnet_mlx.generation.stream import check_context
from bitnet_mlx.models.decoder import Decoder
from bitnet_mlx.serve.app import Options, make_app
from bitnet_mlx.serve.budget import check_room, kv_budget
from bitnet_mlx.serve.engine import Engine, Limits
from bitnet_mlx.serve.fleet import Fleet, Served
from bitnet_mlx.serve.jobs import Model
from bitnet_mlx.serve.pooling import find_pooling
from bitnet_mlx.serve.schema import ReasoningFormat
from bitnet_mlx.serve.server import Server
from bitnet_mlx.tokenizer import Tokenizer

Loader = Callable[[], tuple[Decoder, Tokenizer]]


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
    decoder: Decoder, tokenizer: Tokenizer, model: str | None, options: Options | None = None, *,
    others: Mapping[str, Loader] | None = None, **settings: Any,
) -> Service:  # fmt: skip
    """model: what it was loaded from. others: models that requests may name, and what loads them, in order. settings: those of
    `serve_model`.

    Raises ConfigError for two models of one name, and as serve_model.
    """
    main = serve_model(decoder, tokenizer, model_name(model), **settings)
    listed = others or {}
    if main.model.name in listed:
        raise ConfigError(f"[serve] --allow-model names {main.model.name!r}, which is served already; leave it out")

    def load(name: str) -> Served:
        decoder, tokenizer = listed[name]()
        longest, asked = decoder.config.max_position_embeddings, settings.get("max_kv_size")
        # What was said of the first model's memory and context does not bind another: it takes what is left.
        changed = {"kv_bytes": None, "prefix_bytes": None, "max_kv_size": asked if asked and asked <= longest else None}
        return serve_model(decoder, tokenizer, name, **{**settings, **changed})

    fleet = Fleet(main, listed, load)
    return Service(main.model.name, main.model.context, main.engine.limits, make_app(fleet, options))


def model_name(model: str | None) -> str:
    """A folder is served under its own name, the model in the package as "embedded", others as they were asked for."""
    path = Path(model) if model else None
    return "embedded" if path is None else path.resolve().name if path.exists() else str(model)


def serve_model(
    decoder: Decoder, tokenizer: Tokenizer, name: str, *, max_tokens: int = 1024, max_kv_size: int | None = None,
    running: int = 16, waiting: int = 64, kv_bytes: int | None = None, prefix_bytes: int | None = None,
    seconds: float = math.inf, pooling: str | None = None, prompt_lookup: bool = False, num_draft_tokens: int | None = None,
    reasoning_format: ReasoningFormat = "auto",
) -> Served:  # fmt: skip
    """A model with its engine, not yet started. pooling: of embeddings, "mean", "last" or "none"; None takes what the model's
    files say. reasoning_format: what becomes of thoughts where a request does not say.

    prompt_lookup, num_draft_tokens: guesses for a text that is written alone, as Speculation.by_lookup takes them; what they
    cost is measured now. kv_bytes, prefix_bytes: as kv_budget takes them. seconds: from a text's arrival to its end. Raises
    ConfigError where kv_bytes has no room for a single position, or generation_config.json holds what is not allowed.
    """
    context = check_context(decoder, max_kv_size)
    SamplingConfig.from_generation_config(tokenizer.generation_config)
    kv_bytes, prefix_bytes = kv_budget(decoder, context, running, kv_bytes, prefix_bytes)
    limits = Limits(running=running, waiting=waiting, kv_bytes=kv_bytes, prefix_bytes=prefix_bytes, seconds=seconds)
    found = find_pooling(tokenizer.name_or_path, pooling, tokenizer.gguf_pooling)
    speculation = Speculation.by_lookup(decoder, num_draft_tokens) if prompt_lookup else None
    if speculation is not None:
        speculation.tell = False
        speculation.prepare()
    model = Model(name, decoder, tokenizer, context, max_tokens, int(time.time()), found, reasoning_format)
    return Served(model, Engine(decoder, tokenizer, limits, speculation))


def loaders(models: Sequence[str], backend: str, **options: Any) -> dict[str, Loader]:
    """What loads each of these models (as bitnet_mlx.load names them), by the name that it is served under.

    A model that the memory plan says does not fit now is refused (MemoryLimitError) before anything of it is read.
    """

    def loader(model: str) -> Loader:
        def run() -> tuple[Decoder, Tokenizer]:
            from bitnet_mlx import load
            from bitnet_mlx.checkpoint.hub import resolve

            path = resolve(model)
            check_room(path, model, backend)
            return load(path, backend, **options)

        return run

    found: dict[str, Loader] = {}
    for model in models:
        name = model_name(model)
        if name in found:
            raise ConfigError(f"[serve] --allow-model names {name!r} twice; models need names of their own")
        found[name] = loader(model)
    return found
