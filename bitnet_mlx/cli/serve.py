"""bitnet-mlx serve: an OpenAI-compatible server."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time

from bitnet_mlx.cli import options
from bitnet_mlx.errors import ConfigError

KEY = "BITNET_MLX_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model_arguments(parser)
    group = parser.add_argument_group("server")
    add = group.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)")
    add("--port", type=int, default=8080, help="port to listen on; 0 takes a free one (default: 8080)")
    add("--api-key", metavar="KEY", help=f"what clients must send (default: {KEY} of the environment, else no key)")
    add(
        "--max-tokens", type=int, default=1024, metavar="N", help="of a chat reply that names no number (default: 1024)"
    )
    add("--max-kv-size", type=int, metavar="N", help="limit the context of each text to N tokens")
    add("--max-batch", type=int, default=16, metavar="N", help="texts written at one time (default: 16)")
    add("--max-queue", type=int, default=64, metavar="N", help="texts that may wait, 429 beyond them (default: 64)")
    add(
        "--kv-memory",
        type=float,
        metavar="GIB",
        help="keys and values of all texts (default: a quarter of what is free)",
    )
    add("--pooling", choices=("mean", "last", "none"), help="embeddings of a text (default: as the model's files say)")
    add("--cors", action="append", default=[], metavar="ORIGIN", help="let this web origin ask; may be repeated")
    add("--allow-host", action="append", default=[], metavar="NAME", help="on this machine alone: one more name of it")
    add(
        "--drain",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds that answers have to end after SIGTERM (default: 30)",
    )


def run(args: argparse.Namespace) -> int:
    for name in ("max_tokens", "max_batch", "max_queue"):
        if getattr(args, name) < 1:
            raise ConfigError(f"[serve] --{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    key = args.api_key if args.api_key is not None else os.environ.get(KEY) or None
    if key is not None and (not key.strip() or not key.isascii()):
        raise ConfigError("[serve] the API key is empty or not ASCII; give another one, or leave --api-key out")
    try:
        from bitnet_mlx.serve.app import Options
        from bitnet_mlx.serve.server import host_names, listen
        from bitnet_mlx.serve.service import open_service
    except ImportError as error:
        raise ConfigError(
            f"[serve] {error.name} is not installed; the server needs the extra: pip install 'bitnet-mlx[serve]'"
        ) from error
    from bitnet_mlx import load

    listening = listen(args.host, args.port)  # before the model: a port that is taken is told at once
    with listening:
        start = time.perf_counter()
        model, tokenizer = load(args.model, **options.load_arguments(args))
        hosts = host_names(listening, args.allow_host)
        service = open_service(
            model, tokenizer, args.model, Options(key, origins=tuple(args.cors), hosts=hosts), max_tokens=args.max_tokens,
            max_kv_size=args.max_kv_size, running=args.max_batch, waiting=args.max_queue, kv_gib=args.kv_memory,
            pooling=args.pooling,
        )  # fmt: skip
        port = listening.getsockname()[1]
        host = f"[{args.host}]" if ":" in args.host else args.host
        record = {
            "url": f"http://{host}:{port}", "model": service.name, "backend": model.name,
            "load_s": time.perf_counter() - start, "context": service.context, "kv_positions": service.kv_positions,
        }  # fmt: skip
        if args.json:
            print(json.dumps(record), flush=True)
        else:
            print("serving {model} ({backend}) on {url}, API at {url}/v1".format(**record), file=sys.stderr, flush=True)
        service.run(listening, args.drain)
    return 0
