"""bitnet-mlx inspect MODEL: family, storage, scales, zeros, true bits a weight, bytes read for a decoded token."""

from __future__ import annotations

import argparse
import json

from bitnet_mlx.errors import ConfigError

DEFAULT_CONTEXT = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model = "a model folder, a GGUF file, or owner/name on the Hugging Face hub (default: the model in the package)"
    parser.add_argument("model", nargs="?", metavar="MODEL", help=model)
    parser.add_argument("--revision", help="branch, tag or commit on the hub (default: main)")
    parser.add_argument(
        "--context", type=int, metavar="N",
        help=f"positions in the KV cache for the bytes read (default {DEFAULT_CONTEXT} or the model's context)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    from bitnet_mlx.api import embedded_model
    from bitnet_mlx.backends import choose
    from bitnet_mlx.checkpoint.census import take_census
    from bitnet_mlx.checkpoint.hub import resolve
    from bitnet_mlx.checkpoint.report import record, table

    if args.context is not None and args.context < 0:
        raise ConfigError(f"[inspect] --context is {args.context}; 0 or more is allowed")
    folder = embedded_model() if args.model is None else resolve(args.model, args.revision, progress=not args.json)
    census = take_census(folder)
    context = min(DEFAULT_CONTEXT, census.info.config.max_position_embeddings) if args.context is None else args.context
    found = record(census, context, choose())
    if args.json:
        print(json.dumps(found))
    else:
        print(table(found))
    return 0
