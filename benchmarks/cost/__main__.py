"""Print what the mat-vecs' inner loops cost an Apple GPU, counted and weighed: a model, not a measurement.

Each kernel's text, as MLX generates it, is compiled by clang to unvectorised LLVM IR; the inner loop's operations are
counted and weighed with published throughputs (benchmarks/cost/weigh.py names them), and set against the published
cores, clocks and bandwidths of Apple's chips (bitnet_mlx/backends/kernels/chips.py).
"""

from __future__ import annotations

import argparse
import json
import sys

from benchmarks.cost.report import chip_table, loop_table, measure, records
from benchmarks.cost.subjects import subjects
from tests.emulator.compiler import why_not

SHOWN = ("words2 R=4", "trits5 R=4", "MLX qmv_fast 2 bits, float16", "mlx-lm BitLinear, float16")  # in the chips' table


def main(given: list[str] | None = None) -> None:
    """Count, and print tables or JSON."""
    parser = argparse.ArgumentParser(prog="metal_cost", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON record a line")
    parser.add_argument("--only", default="", metavar="TEXT", help="the kernels whose names hold TEXT")
    arguments = parser.parse_args(given)
    if reason := why_not():
        sys.exit(f"[metal_cost] nothing can be counted here: {reason}")
    costs = [measure(subject) for subject in subjects() if arguments.only in subject.name]
    if arguments.json:
        for record in records(costs):
            print(json.dumps(record))
        return
    chosen = [cost for cost in costs if cost.subject.name in SHOWN and cost.subject.m == 1]
    lines = [*loop_table(costs), "", *chip_table(chosen)]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
