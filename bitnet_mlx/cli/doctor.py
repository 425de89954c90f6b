"""bitnet-mlx doctor: what this machine can run, whether everything gives the reference's numbers here, and how fast."""

from __future__ import annotations

import argparse
import json
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options but those that all commands share."""
    parser.epilog = "Exit code 1 when an engine or a kernel is wrong on this machine. Progress goes to stderr."


def run(args: argparse.Namespace) -> int:
    from bitnet_mlx.doctor import examine, table

    report = examine(lambda step: print(f"doctor: {step}", file=sys.stderr, flush=True))
    print(json.dumps(report.record()) if args.json else table(report))
    return 0 if report.ok else 1
