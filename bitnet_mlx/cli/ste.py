"""The flags of the straight-through estimator, which `train` and `qat` share."""

from __future__ import annotations

import argparse


def add_ste_arguments(parser: argparse.ArgumentParser) -> None:
    """Those left out keep the defaults of train/ste.py."""
    group = parser.add_argument_group("gradients through rounding")
    group.add_argument(
        "--ste",
        choices=["standard", "clipped", "soft", "learnable"],
        default="standard",
        help="of weights: unchanged; none beyond the clip; a smooth staircase's (tanh); or clipped with the scale of each "
        "matrix trained too, whose folder holds packed weights (default standard)",
    )
    group.add_argument(
        "--ste-clip", type=float, default=1.5, metavar="C", help="|w| / scale beyond which it is 0 (default 1.5)"
    )
    group.add_argument(
        "--ste-sharpness", type=float, default=2.0, metavar="K", help="of the smooth staircase (default 2)"
    )
