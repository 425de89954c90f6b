"""bitnet-mlx memory MODEL: what a model will take before it is loaded, and whether that fits."""

from __future__ import annotations

import argparse
import json

from bitnet_mlx.api import HEAD_BITS
from bitnet_mlx.backends import NAMES
from bitnet_mlx.cli.options import add_dtype_argument, add_precision_arguments
from bitnet_mlx.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model = "a model folder, a GGUF file, or owner/name on the Hugging Face hub (default: the model in the package)"
    parser.add_argument("model", nargs="?", metavar="MODEL", help=model)
    add = parser.add_argument
    add("--revision", help="branch, tag or commit on the hub (default: main)")
    add("--context", type=int, metavar="N", help="positions of each sequence (default: the model's context)")
    add("--batch", type=int, default=1, metavar="B", help="sequences at once (default: 1)")
    add("--backend", choices=NAMES, default="auto", help="what would compute (default: auto)")
    add("--head-bits", type=int, choices=HEAD_BITS, help="bits of the output head (default: as in the file)")
    add_precision_arguments(parser)
    add_dtype_argument(parser)
    add("--adapter-path", metavar="DIR", help="with this adapter (see bitnet-mlx lora)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: one a core)")
    add("--memory", type=float, metavar="GB", help="plan for a machine of so many GB (2^30 bytes) (default: this one)")
    add("--run", action="store_true", help="load and run the model as planned, and hold the prediction against it")
    add("--plot", metavar="FILE.png|.html", help="draw the run's memory over time, by owner (needs matplotlib)")
    parser.epilog = "Exit code 1 when --run finds the prediction off by more than 5 % on the cpu or mlx engine."


def run(args: argparse.Namespace) -> int:
    if args.memory is not None and not args.memory > 0:
        raise ConfigError(f"[memory] --memory is {args.memory}; a number above 0 is needed")
    if args.plot is not None and not args.run:
        raise ConfigError("[memory] --plot draws what --run measures; give --run as well")
    from bitnet_mlx.api import embedded_model
    from bitnet_mlx.bench.memory import lines, predict, record
    from bitnet_mlx.bench.memory import run as measure
    from bitnet_mlx.checkpoint.hub import resolve
    from bitnet_mlx.memory.plan import Machine

    folder = embedded_model() if args.model is None else resolve(args.model, args.revision, progress=not args.json)
    machine = None if args.memory is None else Machine(int(args.memory * (1 << 30)))
    names = ("head_bits", "dtype", "threads", "kv_bits", "precision", "adapter_path")
    options = {name: getattr(args, name) for name in names}
    name = args.model or "embedded"
    plan = predict(folder, name, args.backend, args.context, args.batch, machine=machine, **options)
    measured = measure(plan, folder, plot=args.plot, **options) if args.run else None
    if args.json:
        print(json.dumps(record(plan, measured)))
    else:
        print(plan.table())
        if measured is not None:
            print("\n" + lines(plan, measured))
    return 0 if measured is None or measured.within or not plan.measured else 1
