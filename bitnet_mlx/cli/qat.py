"""bitnet-mlx qat: a float model made ternary by training, with a teacher."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bitnet_mlx.cli.training import add_loop, add_numbers, add_ste, options, watched

_NUMBERS = (
    ("--seq-length", int, "L", "tokens a sequence (default 256)"),
    ("--blend-fraction", float, "F", "of the steps, after which all layers are ternary (default 0.5)"),
)
_TEACHER = (
    ("--kl-weight", float, "K", "share of the KL from its distribution in the loss, 0 to 1 (default 0.5)"),
    ("--temperature", float, "T", "of both distributions in the KL (default 1)"),
    (
        "--hidden-weight",
        float,
        "W",
        "of the distance of hidden states behind each layer, added to the loss (default 0)",
    ),
    ("--attention-weight", float, "W", "of the distance of one layer's attention relations, added too (default 0)"),
    ("--attention-layer", int, "N", "that layer, counted from 1 (default: the last)"),
    ("--teacher-top-k", int, "K", "most likely tokens that --teacher-cache keeps of each position (default 64)"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `qat`; those left out keep QatOptions' defaults."""
    add = parser.add_argument
    add("--model", required=True, metavar="DIR|REPO", help="float weights of the llama, qwen3 or bitnet family")
    add("--data", nargs="+", type=Path, required=True, metavar="PATH", help="text files, or folders of them")
    add("--output", type=Path, required=True, metavar="DIR", help="folder for the model, checkpoints and log")
    add("--eval-data", nargs="+", type=Path, metavar="FILE", help="text files, measured before and after")
    text = "how layers become ternary: at once, evenly, exponentially, or one by one (default linear)"
    add("--blend", choices=["constant", "linear", "exponential", "layers"], help=text)
    text = "add norms before o_proj and down_proj, as BitNet has them; they grow in with the blend"
    add("--sub-norms", action="store_true", help=text)
    text = "of activations and products (default: the model's own); masters and optimiser are float32"
    add("--dtype", choices=["bfloat16", "float32"], help=text)
    add_numbers(add, _NUMBERS)
    add = parser.add_argument_group("the teacher").add_argument
    add("--teacher", metavar="DIR|REPO|GGUF", help="a model of the same vocabulary (default: the float model itself)")
    add(
        "--hidden-loss",
        choices=["cosine", "mse"],
        help="of --hidden-weight: 1 - cosine, or relative MSE (default cosine)",
    )
    text = "keep what the teacher says here, and let it go while training; a later run of the same data reads it"
    add("--teacher-cache", type=Path, metavar="DIR", help=text)
    add_numbers(add, _TEACHER)
    add_ste(parser)
    add_loop(parser, warmup=50, save_every=200)


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Train, and return the command's record."""
    from bitnet_mlx.train.qat import qat
    from bitnet_mlx.train.qat_options import QatOptions

    return watched(qat, options(args, QatOptions))


def run(args: argparse.Namespace) -> int:
    record = train(args)
    if "rank" in record:
        return 0
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
    if "teacher_cache" in record:
        kept = record["teacher_cache"]
        print(
            f"  teacher's cache: {kept['files']} windows, {kept['bytes']:,} bytes, {kept['written']} new: {kept['folder']}"
        )
    return 0
