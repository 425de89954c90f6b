#!/usr/bin/env python
"""What a memory tracker costs: decoding with one in use and without, in turns, and the processor time of its samples.

PYTHONPATH=. .venv/bin/python benchmarks/bench_tracker.py --backend cpu --record benchmarks/results/tracker.jsonl
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

from bitnet_mlx import MemoryTracker, load, stream_generate
from bitnet_mlx.bench.stamp import append, stamp


def tokens_s(model: Any, tokenizer: Any, tokens: int) -> tuple[float, float]:
    """Seconds of a token after the first, and of the whole stream."""
    times = [time.perf_counter()]
    for _ in stream_generate(model, tokenizer, "def read_config(path):", tokens):
        times.append(time.perf_counter())
    return (times[-1] - times[1]) / (len(times) - 2), times[-1] - times[0]


def measure(backend: str, tokens: int, repeats: int) -> dict[str, Any]:
    """The record. overhead: of the medians. sampling_share: the samples' processor time over the streams' time."""
    model, tokenizer = load(backend=backend)
    tokens_s(model, tokenizer, tokens)
    off, on, spent, streamed, samples = [], [], 0.0, 0.0, 0
    for turn in range(2 * repeats):
        if turn % 4 in (0, 3):  # which one is first alternates
            off.append(tokens_s(model, tokenizer, tokens)[0])
            continue
        with MemoryTracker() as tracker:
            token, whole = tokens_s(model, tokenizer, tokens)
        on.append(token)
        spent, streamed, samples = spent + tracker.sampling_s, streamed + whole, samples + len(tracker.timeline)
    one, two = statistics.median(off), statistics.median(on)
    return {
        "bench": "tracker", "backend": backend, "tokens": tokens, "repeats": repeats, "off_ms": one * 1e3, "on_ms": two * 1e3,
        "overhead": two / one - 1, "sampling_share": spent / streamed, "samples": samples, **stamp(backend),
    }  # fmt: skip


def main() -> None:
    """Print the record, and keep it where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--record", metavar="FILE")
    args = parser.parse_args()
    record = measure(args.backend, args.tokens, args.repeats)
    print(json.dumps(record))
    if args.record:
        append(record, args.record)


if __name__ == "__main__":
    main()
