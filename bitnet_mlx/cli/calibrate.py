"""bitnet-mlx calibrate: ranges of activations, clip points, and the layers that quantising costs most."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bitnet_mlx.cli import options
from bitnet_mlx.cli.progress import Bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `calibrate`."""
    add = parser.add_argument
    add("--data", nargs="+", type=Path, required=True, metavar="FILE", help="UTF-8 text files")
    add("--samples", type=int, default=16, metavar="N", help="stretches of text to run, spread over it (default 16)")
    add("--length", type=int, default=0, metavar="L", help="tokens of each (default 512, or the context)")
    add("--percentile", type=float, default=99.9, metavar="P", help="of |x|, where `percentile` clips (default 99.9)")
    add(
        "--ranges-only",
        action="store_true",
        help="ranges, histograms and clips alone: no runs that measure what clips and layers cost",
    )
    add("--output", type=Path, default=Path("calibration.json"), metavar="FILE", help="default: calibration.json")
    add("--plot", metavar="FILE.png|.html", help="draw ranges and the widest histogram (needs matplotlib)")
    options.add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from bitnet_mlx.calibration.calibrate import calibrate
    from bitnet_mlx.calibration.options import CalibrateOptions
    from bitnet_mlx.calibration.table import table
    from bitnet_mlx.profile.plots import check_path, draw

    if args.plot:
        check_path(args.plot)
    names = ("model", "samples", "length", "percentile", "ranges_only", "output")
    given = {name: getattr(args, name) for name in names}
    wanted = CalibrateOptions(tuple(args.data), options.load_arguments(args), **given)
    with Bar("calibrating") as bar:
        record = calibrate(wanted, lambda _what, done, total: bar.update(done, total))
    if args.plot:
        draw(record, args.plot)
    if args.json:
        parts = ("histogram", "token_peaks")  # they stand in the file
        inputs = [{k: v for k, v in entry.items() if k not in parts} for entry in record["inputs"]]
        print(json.dumps(record | {"inputs": inputs, "output": str(args.output)}))
        return 0
    print(f"{table(record)}\n\n{args.output} holds all of it, histograms included")
    return 0
