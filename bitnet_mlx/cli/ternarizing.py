"""The flags of `convert` about floats that become ternary."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from bitnet_mlx.errors import ConfigError

if TYPE_CHECKING:
    from bitnet_mlx.calibration.post_training import TernarizeOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How, with which text, and what to leave alone. Any of them implies --ternarize."""
    add = parser.add_argument_group("ternary weights from floats, without training").add_argument
    add("--ternarize", action="store_true", help="take float layers for BitNet's master weights")
    add(
        "--ternarize-method",
        choices=("absmean", "least-squares", "gptq"),
        help="absmean (the default); scales and codes nearest to the weights; or nearest in outputs on a text",
    )
    add("--ternarize-scales", choices=("tensor", "row", "group"), help="what shares a scale (default: group, of 128)")
    add(
        "--calibration-data", type=Path, metavar="FILE", help="text to fit to; its last eighth is held out and measured"
    )
    add("--calibration-samples", type=int, default=16, metavar="N", help="stretches of 512 tokens of it (default 16)")
    add("--keep-layers", metavar="N,N", help="layers whose linears stay floats")
    add("--calibration", type=Path, metavar="FILE", help="keep the layers that `bitnet-mlx calibrate` recommends there")


def wanted(args: argparse.Namespace) -> TernarizeOptions | None:
    """What the flags ask for; None where they say no more than --ternarize does. Raises ConfigError."""
    if not any(
        (args.ternarize_method, args.ternarize_scales, args.calibration_data, args.keep_layers, args.calibration)
    ):
        return None
    from bitnet_mlx.calibration.post_training import TernarizeOptions

    return TernarizeOptions(
        args.ternarize_method or "absmean", args.ternarize_scales, args.calibration_data, args.calibration_samples,
        _layers(args.keep_layers), args.calibration,
    )  # fmt: skip


def _layers(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise ConfigError(
            f"[convert] --keep-layers is {text!r}; numbers of layers with commas are needed: 0,7"
        ) from None
