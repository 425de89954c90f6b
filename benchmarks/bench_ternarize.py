"""What ternary weights cost a float model, by way of making them, on one held-out text.

    python benchmarks/bench_ternarize.py --model DIR --calibration-data FILE --eval-data FILE [--trained DIR] [--record FILE.jsonl]

Each method of `convert --ternarize-method` is fitted to the calibration text; perplexity, KL and agreement against the float
model are then measured on the other one. --trained adds what `qat` made of the same model. Times are of one run each.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from bitnet_mlx.api import load, make_decoder  # noqa: E402
from bitnet_mlx.backends import choose  # noqa: E402
from bitnet_mlx.bench.stamp import append, stamp  # noqa: E402
from bitnet_mlx.calibration.post_training import TernarizeOptions, convert_ternary  # noqa: E402
from bitnet_mlx.checkpoint.read import open_weights  # noqa: E402
from bitnet_mlx.quality.score import score  # noqa: E402
from bitnet_mlx.quality.texts import read_text  # noqa: E402
from bitnet_mlx.tokenizer import load_tokenizer  # noqa: E402

WAYS = (
    ("absmean", "tensor"), ("least-squares", "tensor"), ("least-squares", "row"), ("least-squares", "group"),
    ("gptq", "tensor"), ("gptq", "row"), ("gptq", "group"),
)  # fmt: skip
LENGTH, LIMIT = 256, 4000


def measured(folder: Path, args: argparse.Namespace, teacher: Any, backend: str) -> dict[str, float | int]:
    """A ternary model's figures on the held-out text."""
    model, tokenizer = load(folder, backend)
    text = read_text(args.eval_data, tokenizer, LIMIT)
    return score(model, text.ids, text.nbytes, LENGTH, LENGTH // 2, teacher).record()


def main() -> None:
    """Run the ways in turn; print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--calibration-data", "--eval-data"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--trained", type=Path)
    parser.add_argument("--trained-as", default="qat", help="what the record says of it")
    parser.add_argument("--record", type=Path)
    args = parser.parse_args()
    backend = choose().name
    weights = open_weights(args.model, floats=True)
    teacher = make_decoder(backend, weights)
    record: dict[str, Any] = {
        **stamp(backend), "benchmark": "ternarize", "backend": backend, "ways": [],
        "parameters_of_linears": sum(n * k for n, k in weights.config.linear_shapes().values()) * weights.config.num_hidden_layers,
        "calibration_tokens": len(load_tokenizer(args.model).encode(args.calibration_data.read_text("utf-8"))),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        for method, scales in WAYS:
            options = TernarizeOptions(method, None if method == "absmean" else scales, args.calibration_data)
            start = time.perf_counter()
            done, _ = convert_ternary(args.model, Path(scratch) / f"{method}-{scales}", options, head_bits=16)
            entry = {"method": method, "scales": scales, "seconds": time.perf_counter() - start}
            entry |= {"bits_per_weight": done.bits_per_weight, **measured(Path(done.path), args, teacher, backend)}
            record["ways"].append(entry)
            print(json.dumps(entry), flush=True)
    if args.trained:
        entry = {"method": args.trained_as, "scales": "tensor", **measured(args.trained, args, teacher, backend)}
        record["ways"].append(entry)
        print(json.dumps(entry), flush=True)
    if args.record:
        append(record, args.record)


if __name__ == "__main__":
    main()
