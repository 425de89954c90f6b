#!/usr/bin/env python
"""Speculative decoding with and without, in turns: the embedded model on code that repeats itself and on code that does not,
guesses by prompt look-up, by the model's own first layers, and by a random model; and what rows cost at 2B-4T's shape.

PYTHONPATH=. .venv/bin/python benchmarks/bench_speculate.py --backend cpu --record benchmarks/results/speculate.jsonl
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from typing import Any

from bitnet_mlx import stream_generate
from bitnet_mlx.api import embedded_model, make_decoder
from bitnet_mlx.bench.random_decoder import config_2b, random_decoder
from bitnet_mlx.bench.stamp import append, stamp
from bitnet_mlx.checkpoint.read import read_weights
from bitnet_mlx.generation import SamplingConfig, Speculation
from bitnet_mlx.generation.row_times import measure as measure_rows
from bitnet_mlx.models.weights import DecoderWeights
from bitnet_mlx.tokenizer import load_tokenizer

REPEATING = "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y\n\n" + "".join(
    f"    def get_{name}(self):\n        return self.{name}\n\n    def set_{name}(self, {name}):\n        self.{name} = {name}\n\n"
    for name in "xy"
)  # fmt: skip
PROMPTS = {"repeats": REPEATING + "    def get_z(self):", "does not": "def read_config(path):"}


def first_layers(weights: DecoderWeights, count: int) -> DecoderWeights:
    """The same embedding and head over fewer layers: a draft that needs no training."""
    return replace(weights, config=replace(weights.config, num_hidden_layers=count))


def measure(backend: str, tokens: int, repeats: int) -> dict[str, Any]:
    """tokens/s after the first token, medians and range, in turns within each repeat; and whether the texts are equal."""
    weights, tokenizer = read_weights(embedded_model()), load_tokenizer(embedded_model())
    model = make_decoder(backend, weights)
    cut = make_decoder(backend, first_layers(weights, 2))
    noise = make_decoder(backend, random_decoder(replace(weights.config, num_hidden_layers=1), seed=3))
    ways: dict[str, Speculation | None] = {
        "without": None,
        "look-up": Speculation.by_lookup(model),
        "its first 2 layers": Speculation.by_model(model, tokenizer, cut, tokenizer),
        "a random layer": Speculation.by_model(model, tokenizer, noise, tokenizer),
    }
    runs = []
    for prompt, text in PROMPTS.items():
        for temp in (0.0, 0.7):
            speeds: dict[str, list[float]] = {way: [] for way in ways}
            made: dict[str, list[int]] = {}
            told: dict[str, Any] = {}
            for _ in range(1 + repeats):
                for way, speculation in ways.items():
                    responses = list(stream_generate(
                        model, tokenizer, text, tokens, sampling=SamplingConfig(temp=temp, seed=7), speculation=speculation
                    ))  # fmt: skip
                    speeds[way].append(responses[-1].generation_tps)
                    made[way] = [r.token for r in responses]
                    report = responses[-1].speculation
                    told[way] = report.record() if report else None
            runs.append({
                "prompt": prompt, "temp": temp, "tokens": len(made["without"]),
                "same_text": all(tokens == made["without"] for tokens in made.values()),
                "tokens_s": {way: spread(found[1:]) for way, found in speeds.items()}, "last_reports": told,
            })  # fmt: skip
    return {"bench": "speculate", "backend": backend, "repeats": repeats, "runs": runs, **stamp(backend)}


def spread(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def rows_of_2b(backend: str, layers: int) -> dict[int, float]:
    """Seconds of a step by its rows, random weights of 2B-4T's shape with its head."""
    return measure_rows(make_decoder(backend, random_decoder(config_2b(layers))))


def main() -> None:
    """Print the record, and keep it where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=6, help="of the 2B-4T-shaped model; 0 leaves it out")
    parser.add_argument("--record", metavar="FILE")
    args = parser.parse_args()
    record = measure(args.backend, args.tokens, args.repeats)
    if args.layers:
        record |= {"layers_2b": args.layers, "row_seconds_2b": rows_of_2b(args.backend, args.layers)}
    print(json.dumps(record))
    if args.record:
        append(record, args.record)


if __name__ == "__main__":
    main()
