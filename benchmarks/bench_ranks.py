#!/usr/bin/env python
"""Training in several processes against one that accumulates as many batches: is it the same run, and how fast is it?

PYTHONPATH=. python benchmarks/bench_ranks.py --backend nccl --record benchmarks/results/ranks.jsonl

Both are `bitnet-mlx train` on the same random token ids, the one as `mlx.launch` starts it. Compared step by step: losses and
gradient norms, equal to the last bit on a CPU. The one process runs twice, and is compared with itself too: a GPU sums some
gradients in an order of its own each time. Speed is the median of the steps behind the first five, of all ranks together.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_mlx.bench.stamp import append, stamp
from bitnet_mlx.train.log import NAME, read

PRESETS = {
    "toy": "--vocab-size 320 --hidden-size 64 --intermediate-size 128 --num-layers 2 --num-heads 2 --seq-length 64 --batch-size 4",
    "embedded": "--vocab-size 3072 --hidden-size 384 --intermediate-size 1024 --num-layers 8 --num-heads 6 --num-kv-heads 2 "
    "--seq-length 1024 --batch-size 16",
}
SKIPPED = 5  # steps whose kernels are still being compiled


def prepare(folder: Path, vocab: int) -> Path:
    """Random token ids beside a tokenizer of as many entries."""
    names = {str(i): i for i in range(vocab)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": names}, "added_tokens": []}), "utf-8")
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(0, vocab, 1 << 20).astype(np.uint16))
    return folder / "ids.npy"


def run(launcher: list[str], words: list[str], output: Path, seconds: float) -> dict[str, Any]:
    """Take a run; its log, and what it said if it failed or was ended for taking longer than `seconds`."""
    command = [*launcher, sys.executable, "-m", "bitnet_mlx", "train", "--output", str(output), *words]
    begun = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            said, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.terminate()  # mlx.launch ends its ranks
            said, _ = process.communicate()
    log = read(output / NAME) if (output / NAME).exists() else []
    return {"log": log, "code": process.returncode, "said": said, "seconds": time.perf_counter() - begun}


def compared(one: list[dict[str, Any]], many: list[dict[str, Any]]) -> dict[str, Any]:
    """Over the steps: how many are equal to the bit, all before which, and the largest relative differences."""
    found: dict[str, Any] = {"steps": [len(one), len(many)]}
    for name in ("loss", "grad_norm"):
        pairs = [(a[name], b[name]) for a, b in zip(one, many, strict=False)]
        found[name] = {
            "equal": sum(a == b for a, b in pairs),
            "first_unequal": next((step for step, (a, b) in enumerate(pairs, 1) if a != b), None),
            "largest_difference": max((abs(a - b) / abs(a) for a, b in pairs), default=None),
            "last": pairs[-1] if pairs else None,
        }
    return found


def step_seconds(log: list[dict[str, Any]]) -> float | None:
    """Median of the steps behind the first ones; None where there are too few."""
    times = [entry["seconds"] for entry in log]
    steps = [after - before for before, after in zip(times[SKIPPED:], times[SKIPPED + 1 :], strict=False)]
    return statistics.median(steps) if steps else None


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The record."""
    sizes = PRESETS[args.preset].split()
    find = lambda name: int(sizes[sizes.index(name) + 1])  # noqa: E731
    launcher = [str(Path(sys.executable).parent / "mlx.launch"), "-n", str(args.ranks), "--backend", args.backend]
    if not Path(launcher[0]).exists():  # MLX unpacked beside another Python has no scripts
        launcher[:1] = [sys.executable, "-c", "from mlx._distributed_utils.launch import main; main()"]
    launcher += ["--starting-port", str(args.port), "--nccl-port", str(args.port), "--cwd", os.getcwd()]
    launcher += [
        "--env",
        f"PYTHONPATH={os.environ.get('PYTHONPATH', '')}",
        *(["--verbose"] if args.verbose else []),
        "--",
    ]
    with tempfile.TemporaryDirectory() as folder:
        words = ["--data", str(prepare(Path(folder), find("--vocab-size"))), *sizes, "--iters", str(args.iters)]
        words += ["--dtype", args.dtype, "--steps-per-report", "1", "--rank-timeout", str(args.seconds)]
        many = run(launcher, words, Path(folder) / "many", args.seconds)
        words += ["--grad-accumulation-steps", str(args.ranks)]
        one, again = (run([], words, Path(folder) / name, args.seconds) for name in ("one", "again"))
    tokens = args.ranks * find("--seq-length") * find("--batch-size")
    speed: dict[str, Any] = {}
    for name, ran in (("one", one), ("ranks", many)):
        seconds = step_seconds(ran["log"])
        speed[name] = {"step_ms": seconds * 1e3, "tokens_per_second": tokens / seconds} if seconds else {}
        if ran["code"]:
            speed[name] |= {"code": ran["code"], "said": ran["said"][-4000:]}
    return {
        "bench": "ranks", "backend": args.backend, "ranks": args.ranks, "preset": args.preset, "dtype": args.dtype,
        "iters": args.iters, "compared": compared(one["log"], many["log"]),
        "compared_itself": compared(one["log"], again["log"]), "speed": speed,
        "whole_s": {"one": one["seconds"], "ranks": many["seconds"]}, **stamp("mlx"),
    }  # fmt: skip


def main() -> None:
    """Print the record, and keep it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("ring", "nccl"), default="ring")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--preset", choices=PRESETS, default="toy")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--iters", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=200.0, help="the longest that either may take")
    parser.add_argument("--port", type=int, default=32323)
    parser.add_argument("--verbose", action="store_true", help="mlx.launch's own messages; of NCCL too")
    parser.add_argument("--record", metavar="FILE")
    args = parser.parse_args()
    record = measure(args)
    print(json.dumps(record))
    if args.record:
        append(record, args.record)


if __name__ == "__main__":
    main()
