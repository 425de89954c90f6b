"""Quantisation-aware training from a float model to a ternary one, with the float model, or another, as the teacher.

OUTPUT/model.safetensors, config.json, tokenizer    train/masters_export.py
OUTPUT/checkpoints/step-00000200                    train/checkpoint.py
OUTPUT/log.jsonl                                    one JSON record a line
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from bitnet_mlx.train import ahead
from bitnet_mlx.train.blend import blends
from bitnet_mlx.train.disk import writing
from bitnet_mlx.train.group import Group, join
from bitnet_mlx.train.losses import Losses, Signal
from bitnet_mlx.train.masters import set_blend, trained
from bitnet_mlx.train.masters_export import write_masters
from bitnet_mlx.train.optimizer import PARAMETERS, Tensors
from bitnet_mlx.train.qat_options import QatOptions
from bitnet_mlx.train.qat_run import Run, prepare
from bitnet_mlx.train.run import Job, Report, begin, refuse_earlier, run
from bitnet_mlx.train.scalars import numbers
from bitnet_mlx.train.update import Part, Task


def make_job(work: Run, group: Group, compiles: bool | None = None) -> Job:
    """What the loop trains, in its folder. Raises ConfigError where the text is shorter than one window.

    compiles: whether blends are inputs of the step, so that it may be compiled; None does so on a GPU.
    """
    options, student = work.options, work.student
    objective = Losses(student, options, lambda: work.teacher.model)
    layers = list(student.layers)  # in a step they are called through something else
    batches = options.grad_accumulation_steps * group.size
    compiles = mx.default_device() == mx.gpu if compiles is None else compiles

    def blend(step: int) -> list[float]:
        return blends(options.blend, step, round(options.blend_fraction * options.iters), len(layers))

    def part(index: int) -> Part:
        rows = work.batch(index)
        at = (mx.array(blend(index // batches)),) if compiles else ()
        inputs = (mx.array(rows), work.teacher.signal(rows[:, :-1]), *at)
        return Part(inputs, 1.0, options.batch_size * options.seq_length)

    def loss(batch: mx.array, signal: Signal, at: mx.array | None = None) -> Tensors:
        if at is not None:  # inputs of a compiled step; numbers would be constants of it
            set_blend(layers, numbers(at))
        return objective(batch, signal)

    def before(step: int) -> dict[str, Any]:
        at = blend(step)
        set_blend(layers, at)
        return {"blend": sum(at) / len(at)}

    task = Task(options, student, loss, part, compiles)
    return Job(task, options.output, work.course(group.size), work.windows.position, before)


def qat(options: QatOptions, report: Report) -> dict[str, Any]:
    """The whole run; see train/run.py for the log and `report`.

    Returns the command's record: first_loss and loss, and with held-out text the float model's figures ("parent"), those of
    its weights made ternary without training ("before") and those after it ("after"); with --teacher-cache also what that
    holds. Under a launcher this is one rank of several; all but the first return {"rank": n} and write nothing. Raises
    ConfigError, FormatError, MemoryLimitError or TrainError.
    """
    group = join(options.rank_timeout)
    refuse_earlier(options.output, options, "--output", group)
    work = prepare(options)
    if group.rank == 0:
        ahead.start("qat", work.student.dtype, options.optimizer, work.weights.config.hidden_act, options.taught_at)
    job = make_job(work, group)
    record = {"output": str(options.output), "iters": options.iters, "train_tokens": len(work.ids), "ranks": group.size}
    record.update(work.measured("parent", 0.0), **work.measured("before", 1.0))
    place = begin(job, trained(work.student), group)
    a_step = options.grad_accumulation_steps * group.size
    left = range(place.done * a_step, options.iters * a_step)[group.rank :: group.size]
    work.teacher.prepare(left, lambda index: work.batch(index)[:, :-1])
    place = run(job, place, group, report)
    if group.rank:
        return {"rank": group.rank}
    if place.last:
        record.update(first_loss=place.first["loss"], loss=place.last["loss"])
    with writing(options.output / "model.safetensors"):
        write_masters(work.folder, work.weights, place.state[PARAMETERS], options.output, options.sub_norms)
    record.update(steps=place.done, **work.measured("after", 1.0), device=str(mx.default_device()))
    return {**record, **work.teacher.record()}
