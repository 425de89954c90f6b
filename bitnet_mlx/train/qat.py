"""Quantisation-aware training from a float model to a ternary one, with the float model, or another, as the teacher.

OUTPUT/model.safetensors, config.json, tokenizer    train/masters_export.py
OUTPUT/checkpoints/step-00000200                    train/checkpoint.py
OUTPUT/log.jsonl                                    one JSON record a line
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from bitnet_mlx.errors import ConfigError, TrainError
from bitnet_mlx.train import checkpoint, optimizer
from bitnet_mlx.train.blend import blends
from bitnet_mlx.train.data import Windows
from bitnet_mlx.train.losses import losses
from bitnet_mlx.train.masters import set_blend, trained
from bitnet_mlx.train.masters_export import write_masters
from bitnet_mlx.train.optimizer import Tensors
from bitnet_mlx.train.qat_options import QatOptions
from bitnet_mlx.train.qat_run import Run, prepare
from bitnet_mlx.train.schedule import learning_rate, weight_decay

State = tuple[Tensors, Tensors, Tensors]
Report = Callable[[dict[str, Any]], None]


def put(run: Run, parameters: Tensors) -> None:
    """Set the student's arrays by name."""
    run.student.update(tree_unflatten(list(parameters.items())))


def take_step(run: Run, windows: Windows, done: int, state: State) -> tuple[State, dict[str, Any]]:
    """The update after `done` of them, and its record. Raises TrainError where the loss or a gradient is not finite."""
    options = run.options
    begun = time.monotonic()
    at = blends(options.blend, done, round(options.blend_fraction * options.iters), len(run.student.layers))
    set_blend(run.student, at)
    run.student.train()
    batch = mx.array(run.ids[windows.starts(done)[:, None] + np.arange(options.seq_length + 1)])
    signal = run.teacher.signal(batch[:, :-1])

    def loss(own: Tensors) -> tuple[mx.array, Tensors]:
        put(run, own)
        parts = losses(run.student, batch, signal, options)
        return parts["loss"], parts

    (_, parts), found = mx.value_and_grad(loss)(state[0])
    norm = optimizer.global_norm(found)
    rate = learning_rate(done, options.learning_rate, options.iters, options.warmup)
    rates = optimizer.rates(done, rate, weight_decay(done, options.weight_decay, options.iters))
    new = optimizer.update(*state, found, mx.minimum(1.0, options.grad_clip / (norm + 1e-6)), rates)
    mx.eval(new, parts, norm)
    values = {name: float(np.array(v)) for name, v in {**parts, "grad_norm": norm}.items()}
    if not all(map(math.isfinite, values.values())):
        bad = next((name for name, g in sorted(found.items()) if not mx.isfinite(g).all().item()), "the output")
        raise TrainError(
            f"[qat] step {done + 1}: loss {values['loss']:g}, gradient norm {values['grad_norm']:g}, first in {bad}; both "
            "must be finite. The last checkpoint stays; start anew with a lower --learning-rate"
        )
    put(run, new[0])
    tokens, seconds = batch.size - len(batch), time.monotonic() - begun
    return new, {
        "step": done + 1, **values, "blend": sum(at) / len(at), "learning_rate": rate,
        "tokens_per_second": tokens / seconds, "seconds": seconds,
    }  # fmt: skip


def initial_state(run: Run) -> tuple[int, State]:
    """Steps done, and the state: the float model's, or the newest checkpoint's."""
    parameters = trained(run.student)
    newest = checkpoint.latest(run.options.output / "checkpoints")
    if newest and run.options.resume:
        return checkpoint.load(newest, parameters, run.course())
    if newest:
        raise ConfigError(f"[qat] {newest} is of an earlier run; give --resume to go on, or another --output")
    return 0, (parameters, *optimizer.init(parameters))


def qat(options: QatOptions, report: Report) -> dict[str, Any]:
    """The whole run. Every step's record goes to OUTPUT/log.jsonl, and to `report` every steps_per_report steps.

    Returns the command's record: first_loss and loss, and with held-out text the float model's figures ("parent"), those of
    its weights made ternary without training ("before") and those after it ("after"). Raises ConfigError, FormatError or
    TrainError.
    """
    run = prepare(options)
    windows = Windows(len(run.ids), options.seq_length, options.batch_size, options.seed)
    done, state = initial_state(run)
    record = {"output": str(options.output), "iters": options.iters, "train_tokens": len(run.ids)}
    record.update(run.measured("parent", 0.0), **run.measured("before", 1.0))
    put(run, state[0])
    options.output.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    with open(options.output / "log.jsonl", "a" if options.resume else "w", encoding="utf-8") as log:
        while done < options.iters:
            state, entry = take_step(run, windows, done, state)
            done += 1
            entry["seconds"] = time.monotonic() - begun
            log.write(json.dumps(entry) + "\n")
            log.flush()
            if done == options.iters or done % options.steps_per_report == 0:
                report(entry)
            if done == options.iters or done % options.save_every == 0:
                checkpoint.save(options.output / "checkpoints", done, state, run.course())
            record.setdefault("first_loss", entry["loss"])
            record["loss"] = entry["loss"]
    write_masters(run.folder, run.weights, state[0], options.output)
    return {**record, "steps": done, **run.measured("after", 1.0), "device": str(mx.default_device())}
