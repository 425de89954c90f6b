"""bitnet-mlx train: a ternary transformer of the bitnet architecture from text."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bitnet_mlx.cli.ste import add_ste_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `train`."""
    add = parser.add_argument
    data = "text files, folders of them (.py .txt .md .rst), or one .npy or .bin file of uint16 token ids"
    add("--data", nargs="+", type=Path, required=True, metavar="PATH", help=f"{data} beside its tokenizer.json")
    add("--output", type=Path, required=True, metavar="DIR", help="folder for the model, checkpoints and log")
    add("--model", type=Path, metavar="DIR", help="start from the float weights and tokenizer of this folder")
    add("--eval-data", nargs="+", type=Path, default=[], metavar="PATH", help="held-out data, measured at the end")
    add(
        "--eval-fraction", type=float, default=0.0, metavar="F", help="hold out this share of the documents (default 0)"
    )
    add("--iters", type=int, default=1000, metavar="N", help="optimiser steps (default 1000)")
    add("--batch-size", type=int, default=16, metavar="B", help="sequences a step (default 16)")
    add("--seq-length", type=int, default=256, metavar="L", help="tokens a sequence; the model's context (default 256)")
    add("--learning-rate", type=float, default=1e-3, metavar="LR", help="peak of the schedule (default 1e-3)")
    add("--warmup", type=int, default=100, metavar="N", help="steps of linear warm-up (default 100)")
    add("--weight-decay", type=float, default=0.1, metavar="W", help="in the first half of the steps (default 0.1)")
    add("--grad-clip", type=float, default=1.0, metavar="G", help="largest gradient norm (default 1)")
    add("--seed", type=int, default=0, metavar="S")
    add("--vocab-size", type=int, default=2048, metavar="V", help="entries of a new tokenizer (default 2048)")
    add("--hidden-size", type=int, default=256, metavar="H", help="(default 256)")
    add(
        "--intermediate-size",
        type=int,
        default=0,
        metavar="F",
        help="(default 8/3 of the hidden size, rounded up to 128)",
    )
    add("--num-layers", type=int, default=4, metavar="N", help="(default 4)")
    add("--num-heads", type=int, default=4, metavar="N", help="(default 4)")
    add("--num-kv-heads", type=int, default=0, metavar="N", help="(default: as many as heads)")
    add("--float", dest="quantise", action="store_false", help="train the float twin: the same graph, no quantisers")
    add_ste_arguments(parser)
    add(
        "--teacher",
        type=Path,
        metavar="DIR",
        help="learn from this model too, such as the float twin; written by train",
    )
    add("--kl-weight", type=float, default=0.5, metavar="K", help="share of the teacher's KL in the loss (default 0.5)")
    add("--temperature", type=float, default=1.0, metavar="T", help="of both in that KL (default 1)")
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of activations (default bfloat16)")
    add("--save-every", type=int, default=500, metavar="N", help="steps between checkpoints (default 500)")
    add("--log-every", type=int, default=20, metavar="N", help="steps between log records (default 20)")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --output, if there is one")
    add("--max-seconds", type=float, metavar="S", help="stop early, with a checkpoint, after this long")


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Train, and return the command's record."""
    from bitnet_mlx.train.loop import train as run_training
    from bitnet_mlx.train.options import TrainOptions
    from bitnet_mlx.train.progress import Progress

    names = TrainOptions.__dataclass_fields__
    given = {name: value for name, value in vars(args).items() if name in names}
    given["data"], given["eval_data"] = tuple(args.data), tuple(args.eval_data)
    options = TrainOptions(**given)
    with Progress(options.iters) as progress:
        return run_training(options, progress.report)


def run(args: argparse.Namespace) -> int:
    record = train(args)
    if args.json:
        print(json.dumps(record))
        return 0
    loss = "" if record["loss"] is None else f", loss {record['loss']:.4f}"
    bits = record["bits_per_byte"]
    shown = "" if bits is None else f", {bits:.4f} bits per byte on held-out text"
    print(f"{record['steps']} of {record['iters']} steps{loss}{shown}: {record['output']}")
    return 0
