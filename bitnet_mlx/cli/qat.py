"""bitnet-mlx qat: a float model made ternary by training, with a teacher."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bitnet_mlx.cli.ste import add_ste_arguments

_NUMBERS = (
    ("--iters", int, "N", "optimiser steps (default 1000)"),
    ("--batch-size", int, "B", "sequences a step (default 8)"),
    ("--seq-length", int, "L", "tokens a sequence (default 256)"),
    ("--learning-rate", float, "LR", "peak of the schedule (default 1e-4)"),
    ("--warmup", int, "N", "steps of linear warm-up (default 50)"),
    ("--weight-decay", float, "W", "in the first half of the steps (default 0)"),
    ("--grad-clip", float, "G", "largest gradient norm (default 1)"),
    ("--blend-fraction", float, "F", "of the steps, after which all layers are ternary (default 0.5)"),
    ("--kl-weight", float, "K", "share of the teacher's KL in the loss, 0 to 1 (default 0.5)"),
    ("--temperature", float, "T", "of both distributions in the KL (default 1)"),
    ("--save-every", int, "N", "steps between checkpoints (default 200)"),
    ("--steps-per-report", int, "N", "steps between reports (default 10)"),
    ("--seed", int, "S", "(default 0)"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `qat`; those left out keep QatOptions' defaults."""
    add = parser.add_argument
    add("--model", required=True, metavar="DIR|REPO", help="float weights of the llama, qwen3 or bitnet family")
    add("--data", nargs="+", type=Path, required=True, metavar="PATH", help="text files, or folders of them")
    add("--output", type=Path, required=True, metavar="DIR", help="folder for the model, checkpoints and log")
    add("--teacher", metavar="DIR|REPO|GGUF", help="a model of the same vocabulary (default: the float model itself)")
    add("--eval-data", nargs="+", type=Path, metavar="FILE", help="text files, measured before and after")
    add(
        "--blend",
        choices=["constant", "linear", "exponential", "layers"],
        help="how layers become ternary: at once, evenly, exponentially, or one by one (default linear)",
    )
    add("--resume", action="store_true", help="go on from the newest checkpoint in --output, if there is one")
    for flag, kind, metavar, text in _NUMBERS:
        add(flag, type=kind, metavar=metavar, help=text)
    add_ste_arguments(parser)


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Train, and return the command's record."""
    from bitnet_mlx.train.progress import Progress
    from bitnet_mlx.train.qat import qat
    from bitnet_mlx.train.qat_options import QatOptions

    names = QatOptions.__dataclass_fields__
    given = {name: value for name, value in vars(args).items() if name in names and value is not None}
    given["data"], given["eval_data"] = tuple(args.data), tuple(args.eval_data or ())
    options = QatOptions(**given)
    with Progress(options.iters) as progress:
        return qat(options, progress.report)


def run(args: argparse.Namespace) -> int:
    record = train(args)
    if args.json:
        print(json.dumps(record))
        return 0
    loss = f", loss {record['first_loss']:.4f} to {record['loss']:.4f}" if "loss" in record else ""
    print(f"{record['steps']} of {record['iters']} steps{loss}: {record['output']}")
    titles = (("parent", "float model"), ("before", "ternary, untrained"), ("after", "ternary, trained"))
    for name, title in titles:
        if name in record:
            found = record[name]
            print(f"  {title:<20} perplexity {found['perplexity']:.4f}, KL {found['kl']:.4f} from the teacher")
    return 0
