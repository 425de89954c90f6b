"""The flags of a server, and what they become."""

from __future__ import annotations

import argparse
import math
from typing import Any

from bitnet_mlx.errors import ConfigError

KEY = "BITNET_MLX_API_KEY"
_AT_LEAST_ONE = ("max_tokens", "max_batch", "max_queue")


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """Address, limits, and who may ask."""
    add = parser.add_argument_group("server").add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)")
    add("--port", type=int, default=8080, help="port to listen on; 0 takes a free one (default: 8080)")
    add("--api-key", metavar="KEY", help=f"what clients must send (default: {KEY} of the environment, else no key)")
    add(
        "--max-tokens", type=int, default=1024, metavar="N", help="of a chat reply that names no number (default: 1024)"
    )
    add(
        "--max-kv-size", type=int, metavar="N", help="limit the context of each text to N tokens (default: the model's)"
    )
    add("--max-batch", type=int, default=16, metavar="N", help="texts written at one time (default: 16)")
    add("--max-queue", type=int, default=64, metavar="N", help="texts that may wait, 429 beyond them (default: 64)")
    add("--max-kv-bytes", metavar="SIZE", help="keys and values of all texts, such as 2GB (default: the memory plan's)")
    add("--prompt-cache-bytes", metavar="SIZE", help="beginnings of prompts that are kept; 0: none (default: likewise)")
    add("--prompt-lookup", action="store_true", help="for a text that is written alone: as in generate (the same text)")
    add("--num-draft-tokens", type=int, metavar="N", help="with it: guesses a step (default: as many as pay)")
    add("--request-timeout", type=float, default=600, metavar="S", help="seconds an answer may take (default: 600)")
    add("--pooling", choices=("mean", "last", "none"), help="embeddings of a text (default: as the model's files say)")
    add(
        "--reasoning-format", choices=("auto", "deepseek", "none"), default="auto",
        help="what a model thinks before it answers; none: it stays in the content (default: auto, reasoning_content)",
    )  # fmt: skip
    add(
        "--allow-model", action="append", default=[], metavar="MODEL", help="loaded when a request names it; repeatable"
    )
    add("--cors", action="append", default=[], metavar="ORIGIN", help="let this web origin ask; may be repeated")
    add("--allow-host", action="append", default=[], metavar="NAME", help="on this machine alone: one more name of it")
    add("--drain", type=float, default=30, metavar="S", help="seconds that answers have after SIGTERM (default: 30)")


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of serve.service.open_service. Raises ConfigError naming the flag."""
    for name in _AT_LEAST_ONE:
        if getattr(args, name) < 1:
            raise ConfigError(f"[serve] --{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    if not (math.isfinite(args.request_timeout) and args.request_timeout > 0):
        raise ConfigError(
            f"[serve] --request-timeout is {args.request_timeout}; a number of seconds above 0 is allowed"
        )
    if args.num_draft_tokens is not None and not args.prompt_lookup:
        raise ConfigError("[serve] --num-draft-tokens was given and nothing guesses; give --prompt-lookup as well")
    return {
        "max_tokens": args.max_tokens, "max_kv_size": args.max_kv_size, "running": args.max_batch,
        "waiting": args.max_queue, "seconds": args.request_timeout, "kv_bytes": _bytes(args, "max_kv_bytes"),
        "prefix_bytes": _bytes(args, "prompt_cache_bytes"), "pooling": args.pooling,
        "prompt_lookup": args.prompt_lookup, "num_draft_tokens": args.num_draft_tokens,
        "reasoning_format": args.reasoning_format,
    }  # fmt: skip


def _bytes(args: argparse.Namespace, name: str) -> int | None:
    """A flag's number of bytes."""
    text = getattr(args, name)
    if text is None:
        return None
    from bitnet_mlx.serve.budget import parse_bytes

    return parse_bytes(text, f"--{name.replace('_', '-')}")
