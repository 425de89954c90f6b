"""bitnet-mlx serve: an OpenAI-compatible server."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time

from bitnet_mlx.cli import options, serving
from bitnet_mlx.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model_arguments(parser)
    serving.add_server_arguments(parser)


def run(args: argparse.Namespace) -> int:
    settings = serving.settings(args)
    key = args.api_key if args.api_key is not None else os.environ.get(serving.KEY) or None
    if key is not None and (not key.strip() or not key.isascii()):
        raise ConfigError("[serve] the API key is empty or not ASCII; give another one, or leave --api-key out")
    try:
        from bitnet_mlx.serve.app import Options
        from bitnet_mlx.serve.server import host_names, listen
        from bitnet_mlx.serve.service import loaders, open_service
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
        how = Options(key, origins=tuple(args.cors), hosts=hosts)
        same = {name: getattr(args, name) for name in ("head_bits", "dtype", "kv_bits", "precision", "threads")}
        others = loaders(args.allow_model, model.name, **same)
        service = open_service(model, tokenizer, args.model, how, others=others, **settings)
        port = listening.getsockname()[1]
        host = f"[{args.host}]" if ":" in args.host else args.host
        record = {
            "url": f"http://{host}:{port}", "model": service.name, "backend": model.name,
            "load_s": time.perf_counter() - start, "context": service.context, "kv_bytes": service.limits.kv_bytes,
            "prompt_cache_bytes": service.limits.prefix_bytes,
        }  # fmt: skip
        if args.json:
            print(json.dumps(record), flush=True)
        else:
            print("serving {model} ({backend}) on {url}, API at {url}/v1".format(**record), file=sys.stderr, flush=True)
        service.run(listening, args.drain)
    return 0
