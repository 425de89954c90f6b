"""LoRA: adapters trained on a model whose packed weights stay as they are.

    ADAPTER_PATH/adapters.safetensors, adapter_config.json    the adapter (checkpoint/adapter_mlx.py), written anew with
    ADAPTER_PATH/checkpoints/step-00000100                    each checkpoint (train/checkpoint.py)
    ADAPTER_PATH/log.jsonl                                    one JSON record a line

The order of samples and the dropout's random numbers are functions of the seed and the step, so that a run that was
stopped at any step goes on as if it had not been.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from bitnet_mlx.checkpoint.adapter import AdapterConfig
from bitnet_mlx.checkpoint.adapter_mlx import adapter_parameters, attach, read_parameters, save_adapter
from bitnet_mlx.errors import ConfigError, TrainError
from bitnet_mlx.models.decoder_mlx import MlxModel
from bitnet_mlx.tokenizer import Tokenizer
from bitnet_mlx.train import checkpoint, optimizer
from bitnet_mlx.train.batches import Batch, Batches, batch
from bitnet_mlx.train.lora_options import LoraOptions
from bitnet_mlx.train.optimizer import Tensors
from bitnet_mlx.train.samples import Sample, Samples, read_samples
from bitnet_mlx.train.schedule import learning_rate

State = tuple[Tensors, Tensors, Tensors]
Report = Callable[[dict[str, Any]], None]


class Run(NamedTuple):
    """A run's model and samples, by the file's name: "train", "valid", "test"."""

    options: LoraOptions
    model: MlxModel
    config: AdapterConfig
    samples: dict[str, Samples]


def summed_loss(model: MlxModel, part: Batch) -> mx.array:
    """Cross entropy in nats, float32 [], summed over the targets that count."""
    losses = mx.fast.cross_entropy(model(mx.array(part.inputs)).astype(mx.float32), mx.array(part.targets))
    return (losses * mx.array(part.counts)).sum()


def put(model: MlxModel, parameters: Tensors) -> None:
    """Set some of a model's arrays by full name."""
    model.update(tree_unflatten(list(parameters.items())))


def gradients(model: MlxModel, parameters: Tensors, parts: Iterable[Batch]) -> tuple[mx.array, Tensors]:
    """Mean loss over all targets of the parts, float32 [], and its gradients by name; the parts run one after another."""

    def loss(own: Tensors, part: Batch) -> mx.array:
        put(model, own)
        return summed_loss(model, part)

    run, total, value, summed = mx.value_and_grad(loss), 0, mx.array(0.0), None
    for part in parts:
        one, new = run(parameters, part)
        summed = new if summed is None else {name: summed[name] + g for name, g in new.items()}
        value, total = value + one, total + part.tokens
        mx.eval(value, summed)
    put(model, parameters)
    assert summed is not None
    return value / total, {name: g / total for name, g in summed.items()}


def mean_loss(model: MlxModel, samples: list[Sample], size: int, limit: int) -> float:
    """Cross entropy in nats a token over at most `limit` batches of `size` samples, in the file's order; -1: over all."""
    model.eval()
    nats = tokens = 0.0
    for at in range(0, len(samples), size)[: None if limit < 0 else limit]:
        part = batch(samples[at : at + size])
        nats += float(np.array(summed_loss(model, part)))
        tokens += part.tokens
    return nats / tokens


def prepare(options: LoraOptions, model: MlxModel, tokenizer: Tokenizer) -> Run:
    """Read the samples and check the options against the model. Raises ConfigError or FormatError."""
    window = min(options.max_seq_length, model.config.max_position_embeddings)
    wanted = [name for name, flag in (("train", options.train), ("test", options.test)) if flag]
    if options.train and (options.data / "valid.jsonl").is_file():
        wanted.append("valid")
    if not options.data.is_dir():
        raise ConfigError(f"[lora] no folder {options.data}; --data is a folder with train.jsonl")
    samples = {
        name: read_samples(options.data / f"{name}.jsonl", tokenizer, window, options.mask_prompt, options.long_samples)
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


def course(run: Run) -> dict[str, Any]:
    """What must be equal for a run to go on exactly."""
    return {**run.options.course(), **run.config.record(), "data": run.samples["train"].digest()}


def initial_state(run: Run) -> tuple[int, State]:
    """How many steps are done, and the state: new, from --resume-adapter-file, or from the newest checkpoint."""
    options = run.options
    mx.random.seed(options.seed)
    parameters = attach(run.model, run.config)
    newest = checkpoint.latest(options.adapter_path / "checkpoints")
    if newest and options.resume:
        return checkpoint.load(newest, parameters, json.loads(json.dumps(course(run))))
    if newest:
        raise ConfigError(f"[lora] {newest} is of an earlier run; give --resume to go on, or another --adapter-path")
    if options.resume_adapter_file is not None:
        parameters = read_parameters(options.resume_adapter_file, parameters)
    return 0, (parameters, *optimizer.init(parameters))


def take_step(run: Run, batches: Batches, done: int, state: State) -> tuple[State, dict[str, Any]]:
    """The update after `done` of them, and what it was made of. Raises TrainError where loss or gradient is not finite."""
    options, count = run.options, run.options.grad_accumulation_steps
    begun = time.monotonic()
    mx.random.seed(options.seed * 1_000_003 + done)  # dropout
    run.model.train()
    parts = [batches.at(done * count + i) for i in range(count)]
    loss, found = gradients(run.model, state[0], parts)
    norm = optimizer.global_norm(found)
    rate = learning_rate(done, options.learning_rate, options.iters, options.warmup)
    scale = mx.minimum(1.0, options.grad_clip / (norm + 1e-6))
    new = optimizer.update(*state, found, scale, optimizer.rates(done, rate, 0.0))
    mx.eval(new)
    values = {"loss": float(np.array(loss)), "grad_norm": float(np.array(norm))}
    if not all(map(math.isfinite, values.values())):
        bad = next((name for name, g in sorted(found.items()) if not mx.isfinite(g).all().item()), "the output")
        raise TrainError(
            f"[lora] step {done + 1}: loss {values['loss']:g}, gradient norm {values['grad_norm']:g}, first in {bad}; both must be "
            "finite. The last checkpoint stays; start anew with a lower --learning-rate or --scale"
        )
    put(run.model, new[0])
    seconds, tokens = time.monotonic() - begun, sum(part.tokens for part in parts)
    return new, {
        "step": done + 1, **values, "learning_rate": rate, "trained_tokens": tokens,
        "tokens_per_second": tokens / seconds, "seconds": seconds,
    }  # fmt: skip


def run_steps(run: Run, done: int, state: State, report: Report) -> dict[str, Any]:
    """Take the steps that are left; adapter and checkpoint every `save_every` of them and at the end.

    Returns the losses before and after: {"first_loss", "loss", "valid_loss_before", "valid_loss"}.
    """
    options = run.options
    put(run.model, state[0])
    batches = Batches.of(run.samples["train"].items, options.batch_size, options.seed)
    facts = {"model": options.model, "data": str(options.data), **options.course()}
    found: dict[str, Any] = {"steps": done, "valid_loss_before": _valid(run)}
    begun = time.monotonic()
    while done < options.iters:
        state, entry = take_step(run, batches, done, state)
        done += 1
        last = done == options.iters
        if last or done % options.steps_per_eval == 0:
            found["valid_loss"] = entry["valid_loss"] = _valid(run)
        report({**entry, "seconds": time.monotonic() - begun})
        if last or done % options.save_every == 0:
            save_adapter(options.adapter_path, state[0], run.config, facts)
            checkpoint.save(options.adapter_path / "checkpoints", done, state, course(run))
        found.setdefault("first_loss", entry["loss"])
        found.update(steps=done, loss=entry["loss"])
    return found


def _valid(run: Run) -> float | None:
    held = run.samples.get("valid")
    return mean_loss(run.model, held.items, run.options.batch_size, run.options.val_batches) if held else None


def lora(options: LoraOptions, model: MlxModel, tokenizer: Tokenizer, report: Report) -> dict[str, Any]:
    """The whole run. Every step's record goes to ADAPTER_PATH/log.jsonl, and to `report` every steps_per_report steps.

    Where nothing is trained, the model comes with its adapter.

    Returns the command's record. Raises ConfigError, FormatError or TrainError.
    """
    run = prepare(options, model, tokenizer)
    record: dict[str, Any] = {"adapter_path": str(options.adapter_path), "iters": options.iters}
    for name, samples in run.samples.items():
        record.update(samples.facts(name))
    if options.train:
        start = initial_state(run)
        options.adapter_path.mkdir(parents=True, exist_ok=True)
        mode = "a" if options.resume else "w"
        with open(options.adapter_path / "log.jsonl", mode, encoding="utf-8") as log:

            def tell(entry: dict[str, Any]) -> None:
                log.write(json.dumps(entry) + "\n")
                log.flush()
                if entry["step"] % options.steps_per_report == 0 or entry["step"] == options.iters:
                    report(entry)

            record.update(run_steps(run, *start, tell))
    if options.test:
        loss = mean_loss(model, run.samples["test"].items, options.batch_size, options.test_batches)
        record.update(test_loss=loss, test_perplexity=math.exp(loss))
    trained = sum(array.size for array in adapter_parameters(model).values())
    return {**record, "trained_parameters": trained, "device": str(mx.default_device())}
