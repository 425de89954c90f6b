"""bitnet-mlx doctor: what this machine can run, and whether every engine gives the reference's numbers here."""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options but those that all commands share."""
    parser.epilog = "Exit code 1 when an engine is wrong on this machine."


def run(args: argparse.Namespace) -> int:
    from bitnet_mlx.doctor import examine, table

    report = examine()
    print(json.dumps(report.record()) if args.json else table(report))
    return 0 if report.ok else 1
