"""bitnet-mlx bench: how fast this machine is."""

from __future__ import annotations

import argparse
import json

from bitnet_mlx.backends import NAMES
from bitnet_mlx.cli.options import add_dtype_argument

WHAT = {
    "matmul": "the ternary product alone, our GPU kernels against stock MLX",
    "precision": "the presets memory, balanced and accuracy: bytes, speed and bits per byte of a text",
    "decode": "whole decode steps and prefill of a model, and kernel launches a layer",
    "backends": "every backend that runs here, side by side, in six parts",
    "analysis": "what holds one backend back, in seven parts",
    "regression": "whether it has become slower since a record",
}
DEFAULTS = {
    "precision": (64, 16, 5),
    "backends": (64, 16, 5),
    "analysis": (64, 16, 5),
    "regression": (64, 16, 5),
}  # prompt, tokens, repeats
ANALYSES = ("memory", "regression", "allocation", "optimisation", "devices", "bottleneck", "scaling")
USUAL = {"rows": (1,), "preset": "small", "head_bits": 8, "against": (), "only": ANALYSES}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=WHAT, help="; ".join(f"{name}: {text}" for name, text in WHAT.items()))
    parser.add_argument("--backend", choices=NAMES, default="auto", help="what computes (default: auto)")
    parser.add_argument("--record", metavar="FILE.jsonl", help="append the record to this file")
    parser.add_argument("--plot", metavar="FILE.png|.html", help="draw scaling or memory (analysis, needs matplotlib)")
    group = parser.add_argument_group("matmul")
    group.add_argument("--rows", type=numbers, metavar="M,...", help="rows of activations (default: 1)")
    group = parser.add_argument_group("all others")
    add = group.add_argument
    add("--preset", choices=("small", "2b4t"), help="shapes of random weights (default: small)")
    add("--model", metavar="DIR|REPO", help="a real model instead")
    add("--layers", type=int, metavar="N", help="layers of a random model (default: the preset's)")
    add("--head-bits", type=int, choices=(8, 16), help="head of a random model (default: 8)")
    add_dtype_argument(group)
    add("--prompt", type=int, metavar="N", help="tokens of the prompt (default: 256 for decode, else 64)")
    add("--tokens", type=int, metavar="N", help="tokens to decode behind it (default: 64 for decode, else 16)")
    add("--repeats", type=int, metavar="N", help="medians are of so many turns (default: 5)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: one a core)")
    group = parser.add_argument_group("decode")
    group.add_argument(
        "--against", type=names, metavar="stock,bf16",
        help="compare with plain MLX of the same shapes: 2-bit (stock) or dense (bf16)",
    )  # fmt: skip
    group = parser.add_argument_group("precision")
    group.add_argument("--text", metavar="FILE", help="the text to score (default: a file of this package)")
    group = parser.add_argument_group("analysis")
    group.add_argument("--only", type=names, metavar="NAME,...", help=f"{', '.join(ANALYSES)} (default: all)")
    group = parser.add_argument_group("regression")
    group.add_argument(
        "--compare", metavar="FILE.jsonl",
        help="exit 1 if slower than the last comparable record of this file, 2 if it has none",
    )  # fmt: skip


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers between commas."""
    return tuple(int(part) for part in text.split(","))


def names(text: str) -> tuple[str, ...]:
    """Names between commas."""
    return tuple(text.split(","))


def run(args: argparse.Namespace) -> int:
    from bitnet_mlx.bench.command import check_used, keep, measured

    check_used(args.what, vars(args))
    for name, usual in USUAL.items():
        if getattr(args, name) is None:
            setattr(args, name, usual)
    for name, usual in zip(("prompt", "tokens", "repeats"), DEFAULTS.get(args.what, (256, 64, 5)), strict=True):
        if getattr(args, name) is None:
            setattr(args, name, usual)
    record, lines, code = measured(args.what, vars(args))
    keep(record, vars(args))
    print(json.dumps(record) if args.json else "\n".join(lines))
    return code
