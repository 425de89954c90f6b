"""bitnet-mlx fuse: an adapter fused into its model's weights, ternary again or as floats."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bitnet_mlx.api import DTYPES, HEAD_BITS, I2S_LAYOUTS
from bitnet_mlx.backends import NAMES
from bitnet_mlx.cli.convert import FORMATS
from bitnet_mlx.cli.progress import Bar
from bitnet_mlx.ternary import SCALES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `fuse`; those left out keep FuseOptions' defaults."""
    add = parser.add_argument
    add("--model", metavar="DIR|REPO|GGUF", help="what the adapter was trained on (default: the model in the package)")
    add("--adapter-path", type=Path, metavar="DIR", help="the adapter, ours or mlx-lm's (default: adapters)")
    add("--save-path", type=Path, metavar="DST", help="where the result is to be (default: fused_model)")
    add("--dequantize", action="store_true", help="write floats (float32, or --dtype), the adapter added exactly")
    add("--format", choices=FORMATS, help="of convert (default: words2)")
    methods = "the nearest by absmean or least squares, or what a text makes the nearest outputs of (gptq)"
    default = "default: gptq with --calibration-data, else least-squares"
    add(
        "--method",
        choices=["absmean", "least-squares", "gptq"],
        help=f"how the sum becomes ternary: {methods}; {default}",
    )
    add("--scales", choices=SCALES, help="a scale for each (default: as in the base)")
    add("--calibration-data", type=Path, metavar="FILE", help="UTF-8 text that gptq fits to; its end is held out")
    add("--calibration-samples", type=int, metavar="N", help="stretches of 512 tokens of it (default 16)")
    add("--data", nargs="+", type=Path, metavar="FILE", help="texts to measure base, base and adapter, and fused on")
    add("--length", type=int, metavar="L", help="tokens a window (default 512, or the context)")
    add("--limit", type=int, metavar="N", help="measure on the first N tokens of each text alone (default: all)")
    add("--head-bits", type=int, choices=HEAD_BITS, help="bits of embedding and head (default: as they are)")
    add("--dtype", choices=DTYPES, help="type of what stays floats (default: the checkpoint's)")
    add("--force", action="store_true", help="replace the model at DST")
    add("--revision", help="branch, tag or commit on the hub (default: main)")
    add("--i2s-layout", choices=I2S_LAYOUTS, help="byte layout of I2_S tensors (default: found from the weights)")
    add("--ternarize", action="store_true", help="take float layers for BitNet's master weights")
    add("--backend", choices=NAMES, default="auto", help="what measures (default: auto)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: one a core)")


def run(args: argparse.Namespace) -> int:
    from bitnet_mlx.train.fuse import fuse
    from bitnet_mlx.train.fuse_options import FuseOptions
    from bitnet_mlx.train.fuse_report import report

    names = FuseOptions.__dataclass_fields__
    given = {name: value for name, value in vars(args).items() if name in names and value is not None}
    if args.data is not None:
        given["data"] = tuple(args.data)
    load = {name: getattr(args, name) for name in ("revision", "i2s_layout", "ternarize")}
    options = FuseOptions(load=load, **given)
    with Bar("fusing") as bar:
        record = fuse(options, bar.update)
    print(json.dumps(record) if args.json else "\n".join(report(record)))
    return 0
