"""The training loop: one compiled step, checkpoints, a log of one JSON record a line."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from bitnet_mlx.errors import BitnetError
from bitnet_mlx.quality.bits import bits_per_byte
from bitnet_mlx.train import checkpoint, optimizer
from bitnet_mlx.train.data import Windows
from bitnet_mlx.train.evaluate import total_nats
from bitnet_mlx.train.export import read_master, write_hf
from bitnet_mlx.train.model import TrainDecoder, token_losses
from bitnet_mlx.train.optimizer import Tensors
from bitnet_mlx.train.options import TrainOptions
from bitnet_mlx.train.prepare import Dataset, prepare
from bitnet_mlx.train.schedule import learning_rate, weight_decay

State = tuple[Tensors, Tensors, Tensors]
Report = Callable[[dict[str, Any]], None]
DTYPES = {"bfloat16": mx.bfloat16, "float32": mx.float32}


class DivergedError(BitnetError):
    """The loss or a gradient is no finite number."""


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """mx.compile on a GPU. On the CPU MLX would call a C++ compiler, which may be missing and gains nothing."""
    return mx.compile(function) if mx.default_device().type == mx.DeviceType.gpu else function


def make_step(model: TrainDecoder, length: int, clip: float) -> Callable[..., tuple[State, mx.array]]:
    """The compiled step: (state, ids [tokens], starts [B], rates [4]) -> (state, float32 [2] of loss and gradient norm)."""
    offsets = mx.arange(length + 1)

    def loss(parameters: Tensors, batch: mx.array) -> mx.array:
        model.update(tree_unflatten(list(parameters.items())))
        return token_losses(model, batch).mean()

    def step(state: State, ids: mx.array, starts: mx.array, rates: mx.array) -> tuple[State, mx.array]:
        batch = ids[starts[:, None] + offsets].astype(mx.int32)
        value, gradients = mx.value_and_grad(loss)(state[0], batch)
        norm = optimizer.global_norm(gradients)
        scale = mx.minimum(1.0, clip / (norm + 1e-6))
        return optimizer.update(*state, gradients, scale, rates), mx.stack([value, norm])

    return compiled(step)


def initial_state(options: TrainOptions, dataset: Dataset) -> tuple[TrainDecoder, int, State]:
    """The model, how many steps are done, and the state: new, from --model, or from the newest checkpoint."""
    mx.random.seed(options.seed)
    parameters: Tensors | None = None
    if options.model:
        config, parameters = read_master(options.model, options.seq_length)
    else:
        config = options.model_config(dataset.vocab_size)
    model = TrainDecoder(config, options.quantise, DTYPES[options.dtype])
    own: Tensors = dict(tree_flatten(model.parameters()))  # type: ignore[arg-type]
    parameters = parameters or own
    if options.resume:
        newest = checkpoint.latest(options.output / "checkpoints")
        if newest:
            return (model, *checkpoint.load(newest, own, options.course()))
    return model, 0, (parameters, *optimizer.init(parameters))


def _check(step: int, values: np.ndarray) -> None:
    """values: [steps, 2], the last of them that of `step`."""
    for at, (loss, norm) in enumerate(values, start=step + 1 - len(values)):
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise DivergedError(
                f"[train] step {at}: loss {loss}, gradient norm {norm}; training stops here and the last checkpoint "
                "stays; lower --learning-rate or --grad-clip and use --resume, or start anew"
            )


def run_steps(
    options: TrainOptions, dataset: Dataset, model: TrainDecoder, done: int, state: State, report: Report
) -> tuple[int, State]:
    """Take steps until `iters` or `max_seconds`; a checkpoint every `save_every` steps and at the end."""
    windows = Windows(len(dataset.ids), options.seq_length, options.batch_size, options.seed)
    ids = mx.array(dataset.ids)
    step = make_step(model, options.seq_length, options.grad_clip)
    begun = last = time.monotonic()
    pending: list[mx.array] = []
    folder = options.output / "checkpoints"
    while done < options.iters:
        lr = learning_rate(done, options.learning_rate, options.iters, options.warmup)
        decay = weight_decay(done, options.weight_decay, options.iters)
        state, values = step(state, ids, mx.array(windows.starts(done)), optimizer.rates(done, lr, decay))
        mx.async_eval(state, values)
        if pending:
            mx.eval(pending[-1])  # at most two steps wait in the queue
        pending.append(values)
        done += 1
        late = options.max_seconds is not None and time.monotonic() - begun > options.max_seconds
        if done % options.log_every == 0 or done == options.iters or late or done % options.save_every == 0:
            losses = np.array(mx.stack(pending))
            _check(done, losses)
            now = time.monotonic()
            tokens = len(pending) * options.batch_size * options.seq_length
            report(
                {
                    "step": done, "loss": float(losses[:, 0].mean()), "grad_norm": float(losses[:, 1].mean()),
                    "learning_rate": lr, "tokens": done * options.batch_size * options.seq_length,
                    "tokens_per_second": tokens / (now - last), "seconds": now - begun,
                }
            )  # fmt: skip
            pending, last = [], now
        if done % options.save_every == 0 or done == options.iters or late:
            position = divmod(done * options.batch_size, windows.per_epoch)
            facts = {**options.course(), "epoch": position[0], "window": position[1], "data_tokens": len(dataset.ids)}
            checkpoint.save(folder, done, state, facts)
            last = time.monotonic()
        if late:
            break
    return done, state


def held_out_bits(model: TrainDecoder, dataset: Dataset, length: int) -> float | None:
    """Bits per byte of the held-out ids: windows of `length` tokens moved by half of it."""
    if dataset.held_out is None:
        return None
    losses = compiled(lambda ids: token_losses(model, ids))
    nats = total_nats(losses, dataset.held_out, length, max(1, length // 2))
    return bits_per_byte(nats, dataset.held_out_bytes)


def train(options: TrainOptions, report: Report) -> dict[str, Any]:
    """The whole run: data, steps, export. `report` gets a record now and then; all go to OUTPUT/log.jsonl too.

    Returns the record of the command: steps, tokens, loss, bits_per_byte (None without held-out text), and paths.
    """
    dataset = prepare(options)
    model, done, state = initial_state(options, dataset)
    begun, last = time.monotonic(), {}
    with open(options.output / "log.jsonl", "a" if options.resume else "w", encoding="utf-8") as log:

        def record(entry: dict[str, Any]) -> None:
            last.update(entry)
            log.write(json.dumps(entry) + "\n")
            log.flush()
            report(entry)

        done, state = run_steps(options, dataset, model, done, state, record)
    model.update(tree_unflatten(list(state[0].items())))
    write_hf(options.output, model.config, state[0], options.quantise)
    bits = held_out_bits(model, dataset, options.seq_length)
    return {
        "output": str(options.output), "steps": done, "iters": options.iters, "loss": last.get("loss"),
        "tokens": done * options.batch_size * options.seq_length, "bits_per_byte": bits,
        "parameters": sum(p.size for p in state[0].values()), "device": str(mx.default_device()),
        "seconds": time.monotonic() - begun, "finished": done >= options.iters, **dataset.facts,
    }  # fmt: skip
