"""`bitnet-mlx train`: a model of the bitnet family from text."""

from __future__ import annotations

import time
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from bitnet_mlx.errors import ConfigError
from bitnet_mlx.quality.bits import bits_per_byte
from bitnet_mlx.train import ahead
from bitnet_mlx.train.data import Windows
from bitnet_mlx.train.disk import writing
from bitnet_mlx.train.evaluate import compiled, master_model, total_nats
from bitnet_mlx.train.export import config_json, read_master, write_hf
from bitnet_mlx.train.group import Group, join
from bitnet_mlx.train.losses import output_losses
from bitnet_mlx.train.model import TrainDecoder, with_scales
from bitnet_mlx.train.optimizer import PARAMETERS, Tensors
from bitnet_mlx.train.options import TrainOptions
from bitnet_mlx.train.prepare import Dataset, prepare, vocabulary
from bitnet_mlx.train.run import Job, Report, begin, refuse_earlier, run
from bitnet_mlx.train.update import Part, Task

DTYPES = {"bfloat16": mx.bfloat16, "float32": mx.float32}
# What of a model's graph the shapes of its arrays do not tell.
_GRAPH = ("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_theta")


def make_task(options: TrainOptions, dataset: Dataset, windows: Windows, model: TrainDecoder) -> Task:
    """What the loop trains. With --teacher the loss is that of train/losses.py."""
    teacher = read_teacher(options, dataset, model.config.vocab_size)
    offsets, k = np.arange(options.seq_length + 1), options.kl_weight
    known = None if teacher is None else compiled(teacher.ready, teacher.state)

    def part(index: int) -> Part:
        batch = mx.array(dataset.ids[windows.starts(index)[:, None] + offsets].astype(np.int32))
        signal = () if known is None else (known(batch[:, :-1]),)
        return Part((batch, *signal), 1.0, options.batch_size * options.seq_length)

    def loss(batch: mx.array, *signal: mx.array) -> Tensors:
        ready, targets = model.ready(batch[:, :-1]), batch[:, 1:]
        if teacher is None:
            return {"loss": output_losses(model.head(), ready, {"targets": targets}, 1 / targets.size)["loss"]}
        rows = {"targets": targets, "ready": signal[0]}
        return output_losses(model.head(), ready, rows, 1 / targets.size, k, options.temperature, teacher.head())

    return Task(options, model, loss, part, compiles=True)


def initial_model(options: TrainOptions, dataset: Dataset) -> tuple[TrainDecoder, Tensors]:
    """The model and its parameters: new, or those of --model."""
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
    if parameters is not None:
        return model, with_scales(parameters, ste)
    return model, dict(tree_flatten(model.parameters()))  # type: ignore[arg-type]


def read_teacher(options: TrainOptions, dataset: Dataset, vocab_size: int) -> TrainDecoder | None:
    """The model that --teacher names, as its folder says: a float twin, or ternary. Raises ConfigError where its
    tokenizer is another."""
    if options.teacher is None:
        return None
    if vocabulary(options.teacher) != dataset.vocab:
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


def make_job(options: TrainOptions, dataset: Dataset, model: TrainDecoder, group: Group) -> Job:
    """The run's task in its folder. Raises ConfigError where the data is shorter than one window."""
    windows = Windows(len(dataset.ids), options.seq_length, options.batch_size, options.seed)
    described = config_json(model.config, None)
    graph = {name: described[name] for name in _GRAPH}
    course = {**options.course(group.size), **graph, "data": dataset.digest()}
    return Job(make_task(options, dataset, windows, model), options.output, course, windows.position)


def held_out_bits(model: TrainDecoder, dataset: Dataset, length: int) -> float | None:
    """Bits per byte of the held-out ids: windows of `length` tokens moved by half of it."""
    if dataset.held_out is None:
        return None
    nats = total_nats(model, dataset.held_out, length, max(1, length // 2))
    return bits_per_byte(nats, dataset.held_out_bytes)


def train(options: TrainOptions, report: Report) -> dict[str, Any]:
    """The whole run: data, steps, export; see train/run.py for the log and `report`.

    Returns the record of the command: steps, tokens, loss, bits_per_byte (None without held-out text), and paths. Under a
    launcher this is one rank of several; all but the first return {"rank": n} and write nothing.
    """
    group = join(options.rank_timeout)
    refuse_earlier(options.output, options, "--output", group)
    if group.rank == 0:
        ahead.start("train", options.dtype, options.optimizer, "relu2", options.taught_at)
    dataset = prepare(options)
    model, parameters = initial_model(options, dataset)
    job = make_job(options, dataset, model, group)
    place = begin(job, parameters, group)
    begun = time.monotonic()
    if group.rank == 0:
        with writing(options.output):
            options.output.mkdir(parents=True, exist_ok=True)
            dataset.keep(options.output)
    place = run(job, place, group, report)
    if group.rank:
        return {"rank": group.rank}
    parameters = place.state[PARAMETERS]
    with writing(options.output / "model.safetensors"):
        write_hf(options.output, model.config, parameters, options.quantise)
    bits = held_out_bits(model, dataset, options.seq_length)
    return {
        "output": str(options.output), "steps": place.done, "iters": options.iters, "loss": place.last.get("loss"),
        "tokens": place.tokens, "bits_per_byte": bits, "ranks": group.size,
        "parameters": sum(p.size for p in parameters.values()), "device": str(mx.default_device()),
        "seconds": time.monotonic() - begun, "finished": place.done >= options.iters, **dataset.facts,
    }  # fmt: skip
