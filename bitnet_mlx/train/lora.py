"""LoRA: adapters trained on a model whose packed weights stay as they are.

    ADAPTER_PATH/adapters.safetensors, adapter_config.json    the adapter (checkpoint/adapter_mlx.py), written anew with
    ADAPTER_PATH/checkpoints/step-00000100                    each checkpoint (train/checkpoint.py)
    ADAPTER_PATH/log.jsonl                                    one JSON record a line

The order of samples and the dropout's random numbers are functions of the seed and the batch's number, so that a run that
was stopped at any step goes on as if it had not been.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from bitnet_mlx.checkpoint.adapter import AdapterConfig
from bitnet_mlx.checkpoint.adapter_mlx import adapter_parameters, attach, read_parameters, save_adapter
from bitnet_mlx.errors import ConfigError
from bitnet_mlx.models.decoder_mlx import MlxModel
from bitnet_mlx.tokenizer import Tokenizer
from bitnet_mlx.train.batches import Batch, Batches, batch
from bitnet_mlx.train.disk import writing
from bitnet_mlx.train.group import Group, join
from bitnet_mlx.train.layerwise import put
from bitnet_mlx.train.lora_options import LoraOptions
from bitnet_mlx.train.losses import output_losses, token_losses
from bitnet_mlx.train.optimizer import PARAMETERS, Tensors
from bitnet_mlx.train.packed import SideBySide
from bitnet_mlx.train.pieces import frozen
from bitnet_mlx.train.run import Job, Report, begin, refuse_earlier, run
from bitnet_mlx.train.samples import Sample, Samples, read_samples
from bitnet_mlx.train.update import Part, Task


class Run(NamedTuple):
    """A run's model and samples, by the file's name: "train", "valid", "test"."""

    options: LoraOptions
    model: MlxModel
    config: AdapterConfig
    samples: dict[str, Samples]


def _ready(model: MlxModel, part: Batch) -> mx.array:
    """What the head multiplies, [B, L, H]."""
    cache = [SideBySide(part.places, part.positions)] * len(model.layers) if part.packed else None
    return model.ready(model.model(mx.array(part.inputs), cache, None))


def summed_loss(model: MlxModel, part: Batch) -> mx.array:
    """Cross entropy in nats, float32 [], summed over the targets that count."""
    rows = {"targets": mx.array(part.targets), "counts": mx.array(part.counts)}
    return output_losses(frozen(model), _ready(model, part), rows, 1.0)["loss"]


def mean_loss(model: MlxModel, samples: list[Sample], size: int, limit: int) -> float:
    """Cross entropy in nats a token over at most `limit` batches of `size` samples, in the file's order; -1: over all."""
    model.eval()
    nats = tokens = 0.0
    for at in range(0, len(samples), size)[: None if limit < 0 else limit]:
        part = batch([(sample,) for sample in samples[at : at + size]])
        losses = token_losses(frozen(model), _ready(model, part), mx.array(part.targets))
        nats += float(np.array((losses * mx.array(part.counts)).sum()))
        tokens += part.tokens
    return nats / tokens


def window(options: LoraOptions, model: MlxModel) -> int:
    """Tokens that a sample, or a row of several, has at most."""
    return min(options.max_seq_length, model.config.max_position_embeddings)


def prepare(options: LoraOptions, model: MlxModel, tokenizer: Tokenizer) -> Run:
    """Read the samples and check the options against the model. Raises ConfigError or FormatError."""
    wanted = [name for name, flag in (("train", options.train), ("test", options.test)) if flag]
    if options.train and (options.data / "valid.jsonl").is_file():
        wanted.append("valid")
    if not options.data.is_dir():
        raise ConfigError(f"[lora] no folder {options.data}; --data is a folder with train.jsonl")
    samples = {
        name: read_samples(
            options.data / f"{name}.jsonl", tokenizer, window(options, model), options.mask_prompt, options.long_samples
        )
        for name in wanted
    }
    config = AdapterConfig(
        options.fine_tune_type,
        options.layers(len(model.layers)),
        options.rank,
        options.scale,
        options.dropout,
        options.keys,
    )
    return Run(options, model, config, samples)


def make_job(work: Run, group: Group) -> Job:
    """What the loop trains, in its folder."""
    options, model, samples = work.options, work.model, work.samples["train"]
    width = window(options, model) if options.pack else 0
    batches = Batches.of(samples.items, options.batch_size, options.seed, width)

    def part(index: int) -> Part:
        found = batches.at(index)
        return Part((found,), found.tokens, found.tokens)

    def loss(found: Batch) -> Tensors:
        return {"loss": summed_loss(model, found)}

    def saved(parameters: Tensors) -> None:
        with writing(options.adapter_path):
            save_adapter(options.adapter_path, parameters, work.config, facts)

    facts = {"model": options.model, "data": str(options.data), **options.course(group.size)}
    course = {
        **options.course(group.size), **work.config.record(), "dtype": model.dtype, "data": samples.digest(),
    }  # fmt: skip
    return Job(
        Task(options, model, loss, part), options.adapter_path, course, batches.position, evaluate=partial(_valid, work),
        evaluate_every=options.steps_per_eval, saved=saved,
    )  # fmt: skip


def first_parameters(work: Run) -> Tensors:
    """Those of a new adapter, which is put on the model, or of --resume-adapter-file."""
    options = work.options
    mx.random.seed(options.seed)
    parameters = attach(work.model, work.config)
    if options.resume_adapter_file is not None:
        parameters = read_parameters(options.resume_adapter_file, parameters)
    return parameters


def _valid(work: Run) -> dict[str, float]:
    held, options = work.samples.get("valid"), work.options
    if held is None:
        return {}
    return {"valid_loss": mean_loss(work.model, held.items, options.batch_size, options.val_batches)}


def train(work: Run, group: Group, report: Report) -> dict[str, Any]:
    """Take the steps that are left; returns "steps", and the losses before and after."""
    parameters = first_parameters(work)
    job = make_job(work, group)
    place = begin(job, parameters, group)
    put(work.model, place.state[PARAMETERS])
    found: dict[str, Any] = {f"{name}_before": loss for name, loss in _valid(work).items()}
    place = run(job, place, group, report)
    found["steps"] = place.done
    if place.last:
        found.update(first_loss=place.first["loss"], loss=place.last["loss"])
        found.update({k: place.last[k] for k in ("valid_loss",) if k in place.last})
    return found


def lora(options: LoraOptions, model: MlxModel, tokenizer: Tokenizer, report: Report) -> dict[str, Any]:
    """The whole run; see train/run.py for the log and `report`.

    Returns the command's record. Under a launcher this is one rank of several; all but the first return {"rank": n} and write
    nothing. Where nothing is trained, the model comes with its adapter. Raises ConfigError, FormatError or TrainError.
    """
    group = join(options.rank_timeout)
    if options.train:
        refuse_earlier(options.adapter_path, options, "--adapter-path", group)
    work = prepare(options, model, tokenizer)
    record: dict[str, Any] = {"adapter_path": str(options.adapter_path), "iters": options.iters, "ranks": group.size}
    for name, samples in work.samples.items():
        record.update(samples.facts(name))
    if options.train:
        record.update(train(work, group, report))
    if group.rank:
        return {"rank": group.rank}
    if options.test:
        loss = mean_loss(model, work.samples["test"].items, options.batch_size, options.test_batches)
        record.update(test_loss=loss, test_perplexity=math.exp(loss))
    trained = sum(array.size for array in adapter_parameters(model).values())
    return {**record, "trained_parameters": trained, "device": str(mx.default_device())}
