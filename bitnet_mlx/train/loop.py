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

from bitnet_mlx.errors import ConfigError, TrainError
from bitnet_mlx.quality.bits import bits_per_byte
from bitnet_mlx.train import checkpoint, optimizer
from bitnet_mlx.train.data import Windows
from bitnet_mlx.train.evaluate import compiled, master_model, total_nats
from bitnet_mlx.train.export import read_master, write_hf
from bitnet_mlx.train.losses import distance
from bitnet_mlx.train.model import TrainDecoder, token_losses, with_scales
from bitnet_mlx.train.optimizer import Tensors
from bitnet_mlx.train.options import TrainOptions
from bitnet_mlx.train.prepare import Dataset, prepare, vocabulary
from bitnet_mlx.train.schedule import learning_rate, weight_decay

State = tuple[Tensors, Tensors, Tensors]
Report = Callable[[dict[str, Any]], None]
DTYPES = {"bfloat16": mx.bfloat16, "float32": mx.float32}


def make_step(
    model: TrainDecoder, options: TrainOptions, teacher: TrainDecoder | None = None
) -> Callable[..., tuple[State, mx.array]]:
    """The compiled step: (state, ids [tokens], starts [B], rates [4]) -> (state, float32 [2] of loss and gradient norm).

    With a teacher the loss is that of train/losses.py.
    """
    offsets = mx.arange(options.seq_length + 1)

    def loss(parameters: Tensors, batch: mx.array) -> mx.array:
        model.update(tree_unflatten(list(parameters.items())))
        if teacher is None:
            return token_losses(model, batch).mean()
        logits = model(batch[:, :-1])
        kl = distance(mx.stop_gradient(teacher(batch[:, :-1])), logits, options.temperature).mean()
        entropy = mx.fast.cross_entropy(logits, batch[:, 1:]).mean()
        return (1 - options.kl_weight) * entropy + options.kl_weight * kl

    def step(state: State, ids: mx.array, starts: mx.array, rates: mx.array) -> tuple[State, mx.array]:
        batch = ids[starts[:, None] + offsets].astype(mx.int32)
        value, gradients = mx.value_and_grad(loss)(state[0], batch)
        norm = optimizer.global_norm(gradients)
        scale = mx.minimum(1.0, options.grad_clip / (norm + 1e-6))
        return optimizer.update(*state, gradients, scale, rates), mx.stack([value, norm])

    return compiled(step, None if teacher is None else teacher.state)


def settings(options: TrainOptions, dataset: Dataset) -> dict[str, object]:
    """What must be equal for a run to go on exactly."""
    return {**options.course(), "data_tokens": len(dataset.ids)}


def initial_state(options: TrainOptions, dataset: Dataset) -> tuple[TrainDecoder, int, State]:
    """The model, how many steps are done, and the state: new, from --model, or from the newest checkpoint."""
    mx.random.seed(options.seed)
    parameters: Tensors | None = None
    if options.model:
        config, parameters = read_master(options.model, options.seq_length)
        if config.vocab_size < dataset.vocab_size:
            raise ConfigError(
                f"[train] {options.model} knows {config.vocab_size} token ids, the tokenizer {dataset.vocab_size}; "
                "give the tokenizer that the model was trained with"
            )
    else:
        config = options.model_config(dataset.vocab_size)
    ste = options.estimator if options.quantise else None
    model = TrainDecoder(config, ste, DTYPES[options.dtype])
    own: Tensors = dict(tree_flatten(model.parameters()))  # type: ignore[arg-type]
    parameters = own if parameters is None else with_scales(parameters, ste)
    newest = checkpoint.latest(options.output / "checkpoints")
    if newest and options.resume:
        return (model, *checkpoint.load(newest, own, settings(options, dataset)))
    if newest:
        raise ConfigError(f"[train] {newest} is of an earlier run; give --resume to go on, or another --output")
    return model, 0, (parameters, *optimizer.init(parameters))


def read_teacher(options: TrainOptions, vocab_size: int) -> TrainDecoder | None:
    """The model that --teacher names, as its folder says: a float twin, or ternary. Raises ConfigError where its
    tokenizer is another."""
    if options.teacher is None:
        return None
    if vocabulary(options.teacher) != vocabulary(options.output):
        raise ConfigError(
            f"[train] {options.teacher} has another tokenizer than the model; a teacher must know the same tokens by the "
            "same ids: train it with --float on the same data"
        )
    teacher = master_model(options.teacher, options.seq_length, DTYPES[options.dtype])
    if teacher.config.vocab_size != vocab_size:
        raise ConfigError(
            f"[train] the teacher's logits are {teacher.config.vocab_size} wide, the model's {vocab_size}; they must agree"
        )
    return teacher


def _check(step: int, values: np.ndarray) -> None:
    """values: [steps, 2], the last of them that of `step`."""
    for at, (loss, norm) in enumerate(values, start=step + 1 - len(values)):
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainError(
                f"[train] step {at}: loss {loss:g}, gradient norm {norm:g}; both must be finite. Checkpoints before it "
                "stay; start anew with a lower --learning-rate or --grad-clip"
            )


def run_steps(
    options: TrainOptions, dataset: Dataset, model: TrainDecoder, done: int, state: State, report: Report
) -> tuple[int, State]:
    """Take steps until `iters` or `max_seconds`; a checkpoint every `save_every` steps and at the end."""
    windows = Windows(len(dataset.ids), options.seq_length, options.batch_size, options.seed)
    ids = mx.array(dataset.ids)
    step = make_step(model, options, read_teacher(options, model.config.vocab_size))
    meter = Meter(options, report)
    while done < options.iters:
        lr = learning_rate(done, options.learning_rate, options.iters, options.warmup)
        decay = weight_decay(done, options.weight_decay, options.iters)
        state, values = step(state, ids, mx.array(windows.starts(done)), optimizer.rates(done, lr, decay))
        mx.async_eval(state, values)
        done += 1
        meter.add(values)
        late = options.max_seconds is not None and meter.seconds > options.max_seconds
        save = late or done == options.iters or done % options.save_every == 0
        if save or done % options.log_every == 0:
            meter.tell(done, lr)
        if save:
            position = divmod(done * options.batch_size, windows.per_epoch)
            facts = {**settings(options, dataset), "epoch": position[0], "window": position[1]}
            checkpoint.save(options.output / "checkpoints", done, state, facts)
            meter.restart()
        if late:
            break
    return done, state


class Meter:
    """Collects [loss, gradient norm] of each step while the device works ahead, and tells their means and the speed."""

    def __init__(self, options: TrainOptions, report: Report) -> None:
        self._report = report
        self._per_step = options.batch_size * options.seq_length
        self._waiting: list[mx.array] = []
        self._begun = self._last = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the first step was asked for."""
        return time.monotonic() - self._begun

    def add(self, values: mx.array) -> None:
        """Take the values of one more step; at most two steps wait in the device's queue."""
        if self._waiting:
            mx.eval(self._waiting[-1])
        self._waiting.append(values)

    def restart(self) -> None:
        """Leave out of the speed what passed since the last record."""
        self._last = time.monotonic()

    def tell(self, done: int, lr: float) -> None:
        """Report the steps since the last record; raises TrainError that names the first step without a finite loss."""
        values = np.array(mx.stack(self._waiting))
        _check(done, values)
        now = time.monotonic()
        self._report(
            {
                "step": done,
                "loss": float(values[:, 0].mean()),
                "grad_norm": float(values[:, 1].mean()),
                "learning_rate": lr,
                "tokens": done * self._per_step,
                "tokens_per_second": len(values) * self._per_step / (now - self._last),
                "seconds": now - self._begun,
            }
        )
        self._waiting, self._last = [], now


def held_out_bits(model: TrainDecoder, dataset: Dataset, length: int) -> float | None:
    """Bits per byte of the held-out ids: windows of `length` tokens moved by half of it."""
    if dataset.held_out is None:
        return None
    nats = total_nats(model, dataset.held_out, length, max(1, length // 2))
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
