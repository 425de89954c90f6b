"""Quantisation-aware training from a float model to a ternary one, with the float model, or another, as the teacher.

    OUTPUT/model.safetensors, config.json, tokenizer    float masters that are ternarised when read, here and by transformers
    OUTPUT/checkpoints/step-00000200                    train/checkpoint.py
    OUTPUT/log.jsonl                                    one JSON record a line

The loss is (1 - k) cross entropy + k T^2 KL(teacher || student), both of the distributions at temperature T, the mean over
all positions (Hinton et al., 2015).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from bitnet_mlx.checkpoint.folder import read_config
from bitnet_mlx.checkpoint.hub import resolve
from bitnet_mlx.checkpoint.read import read_weights
from bitnet_mlx.checkpoint.write import copy_files
from bitnet_mlx.errors import ConfigError, TrainError
from bitnet_mlx.formats.dense import DenseRows
from bitnet_mlx.models.decoder_mlx import MlxModel
from bitnet_mlx.models.weights import DecoderWeights
from bitnet_mlx.quality.score import Score, score
from bitnet_mlx.quality.texts import Text, check_same, read_text
from bitnet_mlx.tokenizer import Tokenizer, load_tokenizer
from bitnet_mlx.train import checkpoint, optimizer
from bitnet_mlx.train.blend import blends
from bitnet_mlx.train.corpus import find_files, read_corpus
from bitnet_mlx.train.data import Windows
from bitnet_mlx.train.export import ONLINE
from bitnet_mlx.train.masters import make_student, set_blend, trained
from bitnet_mlx.train.optimizer import Tensors
from bitnet_mlx.train.qat_options import QatOptions
from bitnet_mlx.train.schedule import learning_rate, weight_decay

State = tuple[Tensors, Tensors, Tensors]
Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Run:
    """weights and folder: of the float model. ids: int32 [tokens] of the training text. texts: held-out ones."""

    options: QatOptions
    folder: Path
    weights: DecoderWeights
    student: MlxModel
    teacher: MlxModel
    ids: np.ndarray
    texts: list[Text]


def prepare(options: QatOptions) -> Run:
    """Read models and text. Raises ConfigError or FormatError."""
    folder = resolve(options.model)
    if not folder.is_dir():
        raise ConfigError(f"[qat] {folder} is a file; a Hugging Face folder of float weights is needed")
    tokenizer, weights = load_tokenizer(folder), read_weights(folder)
    if options.seq_length > weights.config.max_position_embeddings:
        raise ConfigError(
            f"[qat] --seq-length is {options.seq_length}; the model's context holds {weights.config.max_position_embeddings}"
        )
    student = make_student(weights)
    texts = [read_text(path, tokenizer) for path in options.eval_data]
    ids = _ids(tokenizer, options)
    teacher = _teacher(options, weights, tokenizer, [Text("--data", np.unique(ids).tolist(), 0), *texts])
    return Run(options, folder, weights, student, teacher, ids, texts)


def _ids(tokenizer: Tokenizer, options: QatOptions) -> np.ndarray:
    corpus = read_corpus(find_files(options.data))
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return np.asarray([i for document in corpus.documents for i in [*tokenizer.encode(document.text), *end]], np.int32)


def _teacher(options: QatOptions, weights: DecoderWeights, tokenizer: Tokenizer, texts: list[Text]) -> MlxModel:
    if options.teacher is None:
        return MlxModel(weights)
    folder = resolve(options.teacher)
    theirs = read_weights(folder)
    if theirs.config.vocab_size != weights.config.vocab_size:
        raise ConfigError(
            f"[qat] the teacher knows {theirs.config.vocab_size} tokens, the model {weights.config.vocab_size}; a teacher "
            "of the same vocabulary is needed"
        )
    for text in texts:
        check_same(tokenizer, load_tokenizer(folder), text)
    return MlxModel(theirs)


def distance(teacher: mx.array, student: mx.array, temperature: float) -> mx.array:
    """T^2 KL(teacher || student) of logits [..., V] at a temperature, the mean over positions, float32 []."""
    p, q = (x.astype(mx.float32) / temperature for x in (teacher, student))
    p, q = p - mx.logsumexp(p, axis=-1, keepdims=True), q - mx.logsumexp(q, axis=-1, keepdims=True)
    return temperature**2 * (mx.exp(p) * (p - q)).sum(axis=-1).mean()


def losses(run: Run, batch: mx.array) -> tuple[mx.array, mx.array]:
    """int32 [B, L + 1] -> (cross entropy of the targets, distance from the teacher), each float32 []; 0 where not used."""
    inputs, options = batch[:, :-1], run.options
    logits = run.student(inputs)
    entropy = mx.fast.cross_entropy(logits.astype(mx.float32), batch[:, 1:]).mean()
    if options.kl_weight == 0:
        return entropy, mx.array(0.0)
    return entropy, distance(mx.stop_gradient(run.teacher(inputs)), logits, options.temperature)


def put(run: Run, parameters: Tensors) -> None:
    """Set the student's arrays by name."""
    run.student.update(tree_unflatten(list(parameters.items())))


def take_step(run: Run, windows: Windows, done: int, state: State) -> tuple[State, dict[str, Any]]:
    """The update after `done` of them, and its record. Raises TrainError where the loss or a gradient is not finite."""
    options, k = run.options, run.options.kl_weight
    begun = time.monotonic()
    at = blends(options.blend, done, round(options.blend_fraction * options.iters), len(run.student.layers))
    set_blend(run.student, at)
    run.student.train()
    batch = mx.array(run.ids[windows.starts(done)[:, None] + np.arange(options.seq_length + 1)])

    def loss(own: Tensors) -> tuple[mx.array, mx.array, mx.array]:
        put(run, own)
        entropy, kl = losses(run, batch)
        return (1 - k) * entropy + k * kl, entropy, kl

    (total, entropy, kl), found = mx.value_and_grad(loss)(state[0])
    norm = optimizer.global_norm(found)
    rate = learning_rate(done, options.learning_rate, options.iters, options.warmup)
    rates = optimizer.rates(done, rate, weight_decay(done, options.weight_decay, options.iters))
    new = optimizer.update(*state, found, mx.minimum(1.0, options.grad_clip / (norm + 1e-6)), rates)
    mx.eval(new, total, entropy, kl, norm)
    names = ("loss", "cross_entropy", "kl", "grad_norm")
    values = {name: float(np.array(v)) for name, v in zip(names, (total, entropy, kl, norm), strict=True)}
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
        return checkpoint.load(newest, parameters, course(run))
    if newest:
        raise ConfigError(f"[qat] {newest} is of an earlier run; give --resume to go on, or another --output")
    return 0, (parameters, *optimizer.init(parameters))


def course(run: Run) -> dict[str, Any]:
    """What must be equal for a run to go on exactly."""
    return {**run.options.course(), "data_tokens": len(run.ids)}


def measured(run: Run, name: str, blend: float) -> dict[str, Any]:
    """Held-out figures of the student with every layer at one blend; {} without held-out text."""
    if not run.texts:
        return {}
    run.student.eval()
    set_blend(run.student, [blend] * len(run.student.layers))
    length = run.options.seq_length
    total = Score(0, 0, 0.0, 0.0, 0.0, 0)
    for text in run.texts:
        total = total + score(run.student, text.ids, text.nbytes, length, max(1, length // 2), run.teacher)
    return {name: total.record()}


def write(run: Run, parameters: Tensors) -> None:
    """The masters, norms and everything that was left alone, as a Hugging Face folder beside the tokenizer."""
    output = run.options.output
    tensors = dict(parameters)
    tables = {"model.embed_tokens": run.weights.embed_tokens}
    if run.weights.lm_head is not run.weights.embed_tokens:
        tables["lm_head"] = run.weights.lm_head
    for name, rows in tables.items():
        assert isinstance(rows, DenseRows)
        tensors[f"{name}.weight"] = mx.array(rows.rows(slice(None)))
    for name, linear in run.weights.linears.items():
        if linear.bias is not None:
            tensors[f"{name}.bias"] = mx.array(linear.bias)
    copy_files(run.folder, output)
    scratch = output / ".model.writing.safetensors"
    mx.save_safetensors(str(scratch), tensors, {"format": "pt"})
    os.replace(scratch, output / "model.safetensors")
    config = {**read_config(run.folder), "quantization_config": ONLINE}
    (output / ".config.writing").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    os.replace(output / ".config.writing", output / "config.json")


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
    record.update(measured(run, "parent", 0.0), **measured(run, "before", 1.0))
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
                checkpoint.save(options.output / "checkpoints", done, state, course(run))
            record.setdefault("first_loss", entry["loss"])
            record["loss"] = entry["loss"]
    write(run, state[0])
    return {**record, "steps": done, **measured(run, "after", 1.0), "device": str(mx.default_device())}
