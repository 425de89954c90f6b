"""bitnet-mlx bench: how fast this machine is."""

from __future__ import annotations

import argparse
import json

from bitnet_mlx.api import DTYPES
from bitnet_mlx.backends import NAMES

WHAT = {
    "matmul": "the ternary product alone, our GPU kernels against stock MLX",
    "precision": "the presets memory, balanced and accuracy: bytes, speed and bits per byte of a text",
    "decode": "whole decode steps and prefill of a model, and kernel launches a layer",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=WHAT, help="; ".join(f"{name}: {text}" for name, text in WHAT.items()))
    parser.add_argument("--backend", choices=NAMES, default="auto", help="what computes (default: auto)")
    group = parser.add_argument_group("matmul")
    group.add_argument("--rows", type=numbers, default=(1,), metavar="M,...", help="rows of activations (default: 1)")
    parser.add_argument("--text", metavar="FILE", help="precision: the text to score (default: a file of this package)")
    group = parser.add_argument_group("decode")
    add = group.add_argument
    add("--preset", choices=("small", "2b4t"), default="small", help="shapes of random weights (default: small)")
    add("--model", metavar="DIR|REPO", help="a real model instead")
    add("--layers", type=int, metavar="N", help="layers of a random model (default: the preset's)")
    add("--head-bits", type=int, choices=(8, 16), default=8, help="head of a random model (default: 8)")
    add("--dtype", choices=DTYPES, help="type of everything that is not ternary")
    add(
        "--against", type=lambda text: tuple(text.split(",")), default=(), metavar="stock,bf16",
        help="compare with plain MLX of the same shapes: 2-bit (stock) or dense (bf16)",
    )  # fmt: skip
    add("--prompt", type=int, default=256, metavar="N", help="tokens of the prompt (default: 256)")
    add("--tokens", type=int, default=64, metavar="N", help="tokens to decode behind it (default: 64)")
    add("--repeats", type=int, default=5, metavar="N", help="medians are of so many turns (default: 5)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: one a core)")


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers between commas."""
    return tuple(int(part) for part in text.split(","))


def run(args: argparse.Namespace) -> int:
    if args.what == "matmul":
        from bitnet_mlx.bench import matmul

        record = matmul.measure(args.backend, args.rows)
        print(json.dumps(record) if args.json else "\n".join(matmul.lines(record)))
        return 0 if record["exact"] else 1
    if args.what == "precision":
        from bitnet_mlx.bench import precision

        record = precision.measure(args.backend, args.model, args.text, args.tokens, repeats=args.repeats)
        print(json.dumps(record) if args.json else "\n".join(precision.lines(record)))
        return 0
    from bitnet_mlx.bench.decode import DecodeOptions, lines, measure

    options = DecodeOptions(**{name: getattr(args, name) for name in DecodeOptions.__dataclass_fields__})
    record = measure(options)
    print(json.dumps(record) if args.json else "\n".join(lines(record)))
    return 0
