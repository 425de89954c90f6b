"""The flags that train, qat and lora share, and what they become."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bitnet_mlx.cli.progress import Bar

if TYPE_CHECKING:
    from bitnet_mlx.train.loop_options import LoopOptions

_Options = TypeVar("_Options", bound="LoopOptions")
_LOOP = (
    ("--iters", int, "N", "optimiser steps"),
    ("--batch-size", int, "B", "sequences, or samples, a batch"),
    ("--grad-accumulation-steps", int, "N", "batches before each update"),
    ("--learning-rate", float, "LR", "peak of the schedule"),
    ("--warmup", int, "N", "steps of linear warm-up before the cosine"),
    ("--weight-decay", float, "W", "of matrices, in the first half of the steps"),
    ("--grad-clip", float, "G", "largest gradient norm"),
    ("--save-every", int, "N", "steps between checkpoints"),
    ("--seed", int, "S", "of weights, order and dropout"),
    ("--rank-timeout", float, "S", "seconds to wait for another process of mlx.launch"),
)


def add_loop(parser: argparse.ArgumentParser, **defaults: float) -> None:
    """The shared flags; those left out keep the options' defaults. defaults: what --help says of the ones that differ."""
    usual = {
        "iters": 1000, "batch_size": 8, "grad_accumulation_steps": 1, "learning_rate": 1e-4, "warmup": 0, "weight_decay": 0,
        "grad_clip": 1, "save_every": 100, "seed": 0, "rank_timeout": 600, "steps_per_report": 10, **defaults,
    }  # fmt: skip
    group = parser.add_argument_group("the loop")
    group.add_argument("--optimizer", choices=["adamw", "muon", "lion"], help="(default adamw)")
    for flag, kind, metavar, text in _LOOP:
        default = usual[flag[2:].replace("-", "_")]
        group.add_argument(flag, type=kind, metavar=metavar, help=f"{text} (default {default:g})")
    text = f"steps between reports (default {usual['steps_per_report']:g}); the log has them all"
    group.add_argument("--steps-per-report", "--log-every", type=int, metavar="N", help=text)
    text = "compute each layer twice, keep nothing of its insides: slower, and less memory"
    group.add_argument("--grad-checkpoint", action="store_true", help=text)
    text = "stop early, with a checkpoint, after this long (default: never)"
    group.add_argument("--max-seconds", type=float, metavar="S", help=text)
    group.add_argument("--resume", action="store_true", help="go on from the newest checkpoint, if there is one")
    group.add_argument("--plot", type=Path, metavar="FILE.png|.html", help="draw the log at the end (needs matplotlib)")


def add_ste(parser: argparse.ArgumentParser) -> None:
    """The flags of the straight-through estimator, for train and qat; those left out keep its defaults."""
    group = parser.add_argument_group("gradients through rounding")
    text = (
        "of weights: unchanged, clipped, a smooth staircase's (tanh), or clipped with scales trained (default standard)"
    )
    group.add_argument("--ste", choices=["standard", "clipped", "soft", "learnable"], help=text)
    numbers = (
        ("--ste-clip", float, "C", "|w| / scale beyond which a clipped one is 0 (default 1.5)"),
        ("--ste-sharpness", float, "K", "of the smooth staircase (default 2)"),
    )
    add_numbers(group.add_argument, numbers)


def add_numbers(add: Callable[..., Any], numbers: tuple[tuple[str, type, str, str], ...]) -> None:
    """Flags of one number each: (flag, type, metavar, help)."""
    for flag, kind, metavar, text in numbers:
        add(flag, type=kind, metavar=metavar, help=text)


def options(args: argparse.Namespace, kind: type[_Options], file: Mapping[str, Any] | None = None) -> _Options:
    """A command's options: the flags that were given, then those of a file. Raises ConfigError for what is not allowed."""
    names, given = kind.__dataclass_fields__, dict(file or {})
    # A switch that was not given is False, and sets nothing against the file.
    given |= {k: v for k, v in vars(args).items() if k in names and v is not None and not (v is False and k in given)}
    for name, value in given.items():
        given[name] = tuple(value) if isinstance(value, list) else value
    return kind(**given)


def watched(run: Callable[..., dict[str, Any]], chosen: LoopOptions, *rest: Any) -> dict[str, Any]:
    """What run(chosen, *rest, report) returns; its steps are shown on stderr, as a bar on a terminal."""
    with Bar("compiling", remains=True) as bar:

        def report(entry: dict[str, Any]) -> None:
            speed = f"{entry['tokens_per_second']:,.0f} tokens/s"
            text = f"step {entry['step']}/{chosen.iters}  loss {entry['loss']:.4f}  {speed}"
            bar.update(entry["step"], chosen.iters, text, f"{text}  {entry['seconds']:.0f} s")

        return run(chosen, *rest, report)
