"""bitnet-mlx train: a ternary transformer of the bitnet architecture from text."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bitnet_mlx.cli.training import add_loop, add_numbers, add_ste, options, watched

_NUMBERS = (
    ("--eval-fraction", float, "F", "hold out this share of the documents (default 0)"),
    ("--seq-length", int, "L", "tokens a sequence; the model's context (default 256)"),
    ("--vocab-size", int, "V", "entries of a new tokenizer (default 2048)"),
    ("--hidden-size", int, "H", "(default 256)"),
    ("--intermediate-size", int, "F", "(default 8/3 of the hidden size, rounded up to 128)"),
    ("--num-layers", int, "N", "(default 4)"),
    ("--num-heads", int, "N", "(default 4)"),
    ("--num-kv-heads", int, "N", "(default: as many as heads)"),
    ("--kl-weight", float, "K", "share of the teacher's KL in the loss (default 0.5)"),
    ("--temperature", float, "T", "of both in that KL (default 1)"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `train`; those left out keep TrainOptions' defaults."""
    add = parser.add_argument
    data = "text files, folders of them (.py .txt .md .rst), or one .npy or .bin file of uint16 token ids"
    add("--data", nargs="+", type=Path, required=True, metavar="PATH", help=f"{data} beside its tokenizer.json")
    add("--output", type=Path, required=True, metavar="DIR", help="folder for the model, checkpoints and log")
    add("--model", type=Path, metavar="DIR", help="start from the float weights and tokenizer of this folder")
    add("--eval-data", nargs="+", type=Path, metavar="PATH", help="held-out data, measured at the end")
    add("--float", dest="quantise", action="store_false", help="train the float twin: the same graph, no quantisers")
    text = "learn from this model too, such as the float twin; written by train"
    add("--teacher", type=Path, metavar="DIR", help=text)
    text = "of activations and products (default bfloat16); weights and optimiser are float32"
    add("--dtype", choices=["bfloat16", "float32"], help=text)
    add_numbers(add, _NUMBERS)
    add_ste(parser)
    add_loop(
        parser, batch_size=16, learning_rate=1e-3, warmup=100, weight_decay=0.1, save_every=500, steps_per_report=20
    )


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Train, and return the command's record."""
    from bitnet_mlx.train.loop import train as run_training
    from bitnet_mlx.train.options import TrainOptions

    return watched(run_training, options(args, TrainOptions))


def run(args: argparse.Namespace) -> int:
    record = train(args)
    if "rank" in record:
        return 0
    if args.json:
        print(json.dumps(record))
        return 0
    loss = "" if record["loss"] is None else f", loss {record['loss']:.4f}"
    bits = record["bits_per_byte"]
    shown = "" if bits is None else f", {bits:.4f} bits per byte on held-out text"
    print(f"{record['steps']} of {record['iters']} steps{loss}{shown}: {record['output']}")
    return 0
