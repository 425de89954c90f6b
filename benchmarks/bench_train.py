#!/usr/bin/env python
"""What a training step costs: ternary against float, in turns, on MLX's default device.

PYTHONPATH=. python benchmarks/bench_train.py --preset 100m --record benchmarks/results/train.jsonl

train float, train ternary: the steps of `bitnet-mlx train --float` and `train`. train taught: with a float teacher of the same
shape. qat float, qat ternary: the steps of `qat` with every layer's blend at 0 and at 1, no teacher. qat taught: ternary, with
the float model as the teacher. Random token ids. Preset wide: a small model of many tokens, whose cost is its logits.
flops are 6 a weight of linears and head and 6 L D a layer of attention (causal) for a token; utilisation is their share
of what a bfloat16 product of 8,192 x 8,192 x 8,192 reaches in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from bitnet_mlx.bench.stamp import append, stamp
from bitnet_mlx.checkpoint.read import read_weights
from bitnet_mlx.models.decoder_mlx import MlxModel
from bitnet_mlx.train import ahead, loop, optimizer, qat
from bitnet_mlx.train.data import Windows
from bitnet_mlx.train.export import write_hf
from bitnet_mlx.train.group import Group
from bitnet_mlx.train.masters import make_student, set_blend, trained
from bitnet_mlx.train.options import TrainOptions
from bitnet_mlx.train.prepare import Dataset
from bitnet_mlx.train.qat_options import QatOptions
from bitnet_mlx.train.qat_run import Run
from bitnet_mlx.train.teacher import Teacher, narrowed
from bitnet_mlx.train.update import Task, Update

_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "seq_length", "batch_size",
)  # fmt: skip
PRESETS: dict[str, dict[str, int]] = {
    name: dict(zip(_SIZES, sizes, strict=True))
    for name, sizes in {
        "toy": (320, 64, 128, 2, 2, 1, 32, 2),
        "embedded": (3072, 384, 1024, 8, 6, 2, 1024, 32),
        "teacher": (3072, 512, 1408, 10, 8, 2, 1024, 32),
        "100m": (32000, 768, 2048, 12, 12, 4, 1024, 16),
        "wide": (128256, 64, 128, 2, 2, 1, 512, 2),
    }.items()
}
NAMES = ("train float", "train ternary", "train taught", "qat float", "qat ternary", "qat taught")


class Trainee:
    """One contender: its task, and where its run is."""

    def __init__(self, task: Task, parameters: optimizer.Tensors) -> None:
        self._update, self._alive, self._step = Update(task, Group()), mx.array(True), 0
        self._state = optimizer.init(task.options.optimizer, parameters)
        mx.eval(self._state)
        task.model.train()

    def steps(self, count: int) -> float:
        """Seconds a step, the host one step ahead of the device as in a run."""
        begun, before = time.perf_counter(), None
        for _ in range(count):
            rates = optimizer.rates(self._step, 1e-4, 0.1)
            self._state, self._alive, values = self._update(self._state, self._alive, self._step, rates)
            mx.async_eval(self._state, self._alive, values)
            if before is not None:
                mx.eval(before)
            before, self._step = values, self._step + 1
        mx.eval(self._state, before)
        return (time.perf_counter() - begun) / count


def plain(options: TrainOptions, ids: np.ndarray) -> Trainee:
    """A step of `train`."""
    ahead.start("train", options.dtype, options.optimizer, "relu2", options.taught_at)
    vocab = {str(i): i for i in range(options.vocab_size)}
    dataset = Dataset(ids, None, 0, vocab, {}, lambda _: None)
    model, parameters = loop.initial_model(options, dataset)
    windows = Windows(len(ids), options.seq_length, options.batch_size, options.seed)
    return Trainee(loop.make_task(options, dataset, windows, model), parameters)


def blended(options: TrainOptions, folder: Path, ids: np.ndarray, blend: float, kl_weight: float = 0.0) -> Trainee:
    """A step of `qat` from the float model in a folder, which is its teacher too."""
    asked = QatOptions(
        model=str(folder), data=(), output=folder, batch_size=options.batch_size, seq_length=options.seq_length,
        kl_weight=kl_weight, dtype=options.dtype, blend="constant",
    )  # fmt: skip
    weights = read_weights(folder)
    ahead.start("qat", options.dtype, options.optimizer, weights.config.hidden_act, asked.taught_at)
    student = make_student(weights, options.dtype)
    teacher = Teacher(lambda: narrowed(MlxModel(weights, options.dtype)), asked, ([], None), None)
    task = qat.make_job(Run(asked, folder, weights, student, teacher, ids.astype(np.int32), []), Group()).task
    set_blend(student.layers, [blend] * len(student.layers))
    if blend == 0:  # without the quantisers; otherwise the blend is an input of the step
        loss = task.loss
        task = replace(task, loss=lambda batch, signal, *_: loss(batch, signal))
    return Trainee(task, trained(student))


def contenders(options: TrainOptions, folder: Path, ids: np.ndarray) -> dict[str, Callable[[], Trainee]]:
    """How to make each; a float model of the options' shape is put into `folder`, with a tokenizer's vocabulary."""
    vocab = {str(i): i for i in range(options.vocab_size)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}, "added_tokens": []}), "utf-8")
    model = loop.TrainDecoder(options.model_config(options.vocab_size), None)
    write_hf(folder, model.config, dict(tree_flatten(model.parameters())), quantise=False)  # type: ignore[arg-type]
    return {
        "train float": lambda: plain(replace(options, quantise=False), ids),
        "train ternary": lambda: plain(options, ids),
        "train taught": lambda: plain(replace(options, teacher=folder), ids),
        "qat float": lambda: blended(options, folder, ids, 0.0),
        "qat ternary": lambda: blended(options, folder, ids, 1.0),
        "qat taught": lambda: blended(options, folder, ids, 1.0, 0.5),
    }


def product_flops() -> float:
    """Floating-point operations a second of a large bfloat16 product, the best of ten; 0 on a CPU, where it says nothing."""
    if mx.default_device().type != mx.DeviceType.gpu:
        return 0.0
    n, best = 8192, float("inf")
    a, b = (mx.random.normal((n, n)).astype(mx.bfloat16) for _ in range(2))
    mx.eval(a, b)
    for _ in range(12):
        begun = time.perf_counter()
        mx.eval(a @ b)
        best = min(best, time.perf_counter() - begun)
    return 2 * n**3 / best


def token_flops(options: TrainOptions) -> int:
    """Of a token's step, forward and backward."""
    config = options.model_config(options.vocab_size)
    linears = sum(n * k for n, k in config.linear_shapes().values())
    attention = (
        options.seq_length * config.hidden_size
    )  # 2 products of 2 L D, half of them masked, twice more backward: 6 L D
    return 6 * (config.num_hidden_layers * (linears + attention) + options.vocab_size * config.hidden_size)


def measure(preset: str, names: list[str], steps: int, repeats: int) -> dict[str, Any]:
    """The record: of each contender the seconds from making the model to the end of its first step, median and quartiles of a
    step, tokens a second, peak memory."""
    options = TrainOptions(data=(), output=Path("."), **PRESETS[preset])  # type: ignore[arg-type]
    ids = (
        np.random.default_rng(0)
        .integers(0, options.vocab_size, options.seq_length * options.batch_size * 40)
        .astype(np.int32)
    )
    tokens, flops, ceiling = options.batch_size * options.seq_length, token_flops(options), product_flops()
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        made = contenders(options, Path(folder), ids)
        running = {}
        for name in names:
            mx.reset_peak_memory()
            held = mx.get_active_memory()
            begun = time.perf_counter()
            running[name] = made[name]()
            running[name].steps(1)
            first = time.perf_counter() - begun
            running[name].steps(2)
            found[name] = {"first_step_s": first, "peak_bytes": mx.get_peak_memory() - held}
        times: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(repeats):
            for name, trainee in running.items():
                times[name].append(trainee.steps(steps))
    for name, samples in times.items():
        low, median, high = statistics.quantiles(samples, n=4)
        found[name] |= {
            "step_ms": median * 1e3,
            "low_ms": low * 1e3,
            "high_ms": high * 1e3,
            "tokens_per_second": tokens / median,
        }
        if ceiling:
            found[name]["utilisation"] = flops * tokens / median / ceiling
    ratios = {
        kind: found[f"{kind} ternary"]["step_ms"] / found[f"{kind} float"]["step_ms"]
        for kind in ("train", "qat") if {f"{kind} ternary", f"{kind} float"} <= set(names)
    }  # fmt: skip
    return {
        "bench": "train", "preset": preset, **PRESETS[preset], "dtype": options.dtype, "steps": steps, "repeats": repeats,
        "flops_a_token": flops, "product_flops": ceiling, "results": found, "ternary_over_float": ratios, **stamp("mlx"),
    }  # fmt: skip


def main() -> None:
    """Print the record, and keep it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="embedded")
    parser.add_argument("--only", default=",".join(NAMES), help="of the contenders, these")
    parser.add_argument("--steps", type=int, default=10, help="of one sample")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--record", metavar="FILE")
    args = parser.parse_args()
    record = measure(args.preset, args.only.split(","), args.steps, args.repeats)
    print(json.dumps(record))
    if args.record:
        append(record, args.record)


if __name__ == "__main__":
    main()
