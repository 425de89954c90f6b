"""bitnet-mlx evaluate: what a model makes of text, and what ternary weights cost against a teacher."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from bitnet_mlx.cli import options
from bitnet_mlx.errors import ConfigError

_OF_TASKS = ("num_fewshot", "include_path", "apply_chat_template")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `evaluate`."""
    add = parser.add_argument
    add("--data", nargs="+", type=Path, default=[], metavar="FILE", help="UTF-8 text files, each scored by itself")
    add(
        "--teacher",
        metavar="DIR|REPO|GGUF",
        help="a model of the same vocabulary: KL, agreement, and with --layers more",
    )
    add("--length", type=int, default=0, metavar="L", help="tokens a window (default 512, or the context)")
    add("--stride", type=int, default=0, metavar="N", help="tokens a window moves on (default half of it)")
    add(
        "--limit",
        type=int,
        metavar="N",
        help="the first N tokens of each file, the first N samples of each task, alone (default: all)",
    )
    add(
        "--layers",
        action="store_true",
        help="zeros of every linear; MSE, SQNR and cosine against the teacher's weights",
    )
    add(
        "--outputs",
        action="store_true",
        help="MSE, SQNR and cosine of every linear's and layer's outputs to the teacher's",
    )
    add("--sensitivity", action="store_true", help="rank layers by the loss that the teacher's weights would take away")
    tasks = parser.add_argument_group("tasks of lm-eval (pip install 'bitnet-mlx[eval]')").add_argument
    tasks("--tasks", nargs="+", metavar="NAME", help="run these; without --data nothing else")
    text = "examples before each question (default: the task's own)"
    tasks("--num-fewshot", "--num-shots", type=int, metavar="N", help=text)
    tasks("--include-path", type=Path, metavar="DIR", help="folder with YAML files of further tasks")
    tasks("--apply-chat-template", action="store_true", help="put questions into the model's chat template")
    options.add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from bitnet_mlx.quality.evaluate import EvaluateOptions, evaluate
    from bitnet_mlx.quality.table import table
    from bitnet_mlx.quality.tasks import TaskOptions

    names = ("model", "teacher", "length", "stride", "limit", "layers", "sensitivity", "outputs")
    given = {name: getattr(args, name) for name in names}
    alone = [f"--{name.replace('_', '-')}" for name in _OF_TASKS if getattr(args, name) not in (None, False)]
    if alone and args.tasks is None:
        raise ConfigError(f"[evaluate] {', '.join(alone)} without --tasks; give --tasks NAME, or leave it out")
    if args.tasks is not None:
        given["tasks"] = TaskOptions(
            tuple(name for word in args.tasks for name in word.split(",")),
            args.num_fewshot,
            args.include_path,
            args.apply_chat_template,
            args.limit,
        )
    wanted = EvaluateOptions(tuple(args.data), options.load_arguments(args), **given)
    record = evaluate(wanted, _progress if args.verbose else None)
    print(json.dumps(record) if args.json else table(record))
    return 0


def _progress(done: int, total: int) -> None:
    print(f"{done} of {total}", file=sys.stderr, flush=True)
