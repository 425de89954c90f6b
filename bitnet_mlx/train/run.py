"""The loop that `train`, `qat` and `lora` share: steps, a log of one JSON record a step, checkpoints.

Every rank of a group takes the same steps; the first alone writes and reports.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from bitnet_mlx.errors import ConfigError, TrainError
from bitnet_mlx.train import checkpoint, optimizer
from bitnet_mlx.train.disk import writing
from bitnet_mlx.train.group import Group
from bitnet_mlx.train.layerwise import put
from bitnet_mlx.train.log import NAME, Log, read
from bitnet_mlx.train.loop_options import LoopOptions
from bitnet_mlx.train.optimizer import PARAMETERS, State, Tensors
from bitnet_mlx.train.schedule import learning_rate, weight_decay
from bitnet_mlx.train.update import Task, Update

Report = Callable[[dict[str, Any]], None]


def _nothing(*_: Any) -> Any:
    return {}


@dataclass(frozen=True)
class Job:
    """A task in its folder.

    course: what must be equal for a run to go on exactly. position: where in the data batch `index` lies. before: called
    with each step, counted from 0; it sets the model up and returns entries of the step's record. evaluate: called every
    `evaluate_every` steps and at the end, with the model's arrays set; its entries go into the record too. saved: called
    with the parameters before each checkpoint.
    """

    task: Task
    folder: Path
    course: dict[str, Any]
    position: Callable[[int], dict[str, Any]]
    before: Callable[[int], dict[str, Any]] = _nothing
    evaluate: Callable[[], dict[str, Any]] = _nothing
    evaluate_every: int = 0
    saved: Callable[[Tensors], Any] = _nothing

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.folder / "checkpoints"


@dataclass
class Place:
    """How far a run is: steps, tokens learned from, the arrays, and the records of its first and last step here."""

    done: int
    state: State
    tokens: int = 0
    first: dict[str, Any] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)


def refuse_earlier(folder: Path, options: LoopOptions, flag: str, group: Group) -> None:
    """Raise ConfigError where `folder` has checkpoints and --resume was not given; called before anything is written."""
    newest = checkpoint.latest(folder / "checkpoints") if group.rank == 0 else None
    if newest and not options.resume:
        raise ConfigError(
            f"[{options.COMMAND}] {newest} is of an earlier run; give --resume to go on, or another {flag}"
        )


def begin(job: Job, parameters: Tensors, group: Group) -> Place:
    """At the newest checkpoint with --resume, else at the start with `parameters`. Raises what checkpoint.load raises."""
    options = job.task.options
    group.check_same({**job.course, "max_seconds": options.max_seconds})
    place = Place(0, optimizer.init(options.optimizer, parameters))
    newest = checkpoint.latest(job.checkpoints) if options.resume and group.rank == 0 else None
    if newest:
        facts, state = checkpoint.load(newest, place.state, job.course)
        place = Place(int(facts["step"]), state, int(facts["trained_tokens"]))
    place.done, place.state = group.from_first(place.done, place.state)
    return place


def run(job: Job, place: Place, group: Group, report: Report) -> Place:
    """Take the steps that are left; a checkpoint every save_every of them and at the end. Raises TrainError.

    Every step's record goes to FOLDER/log.jsonl, and to `report` every steps_per_report steps.
    """
    put(job.task.model, place.state[PARAMETERS])
    if place.done >= job.task.options.iters:
        return place
    if group.rank:
        return _run(job, place, group, _nothing)
    with Log(job.folder, place.done) as log:
        place.first = log.first

        def tell(entries: list[dict[str, Any]]) -> None:
            log.add(entries)
            last, every = entries[-1], job.task.options.steps_per_report
            if last["step"] % every == 0 or last["step"] == job.task.options.iters:
                report(last)

        place = _run(job, place, group, tell)
    if job.task.options.plot is not None:
        _draw(job, job.task.options.plot)
    return place


def _draw(job: Job, plot: Path) -> None:
    from bitnet_mlx.profile.plots import draw

    record = {
        "bench": job.task.options.COMMAND, "backend": job.folder.name, "machine": mx.default_device().type.name,
        "log": read(job.folder / NAME),
    }  # fmt: skip
    with writing(plot):
        draw(record, plot)


def _run(job: Job, place: Place, group: Group, tell: Callable[[list[dict[str, Any]]], None]) -> Place:
    task, options = job.task, job.task.options
    update, meter, alive = Update(task, group), Meter(place), mx.array(True)
    late = False
    while place.done < options.iters and not late:
        task.model.train()
        entry = job.before(place.done)
        lr = learning_rate(place.done, options.learning_rate, options.iters, options.warmup)
        rates = optimizer.rates(place.done, lr, weight_decay(place.done, options.weight_decay, options.iters))
        place.state, alive, values = update(place.state, alive, place.done, rates)
        mx.async_eval(place.state, alive, values)
        place.done += 1
        meter.add(values, {"step": place.done, "learning_rate": lr, **entry})
        late = options.max_seconds is not None and group.any(meter.seconds > options.max_seconds)
        last = late or place.done == options.iters
        save = last or place.done % options.save_every == 0
        look = job.evaluate_every and (last or place.done % job.evaluate_every == 0)
        if save or look or place.done % options.steps_per_report == 0:
            entries, failed = meter.read()
            if look and not failed:
                put(task.model, place.state[PARAMETERS])
                entries[-1].update(job.evaluate())
            if entries:
                place.first, place.last = place.first or entries[0], entries[-1]
                tell(entries)
            if failed:
                raise _failure(job, place, update, failed)
        if save:
            _save(job, place, update, group)
            meter.restart()
    put(task.model, place.state[PARAMETERS])
    return place


def _failure(job: Job, place: Place, update: Update, failed: dict[str, Any]) -> TrainError:
    """Tells the step without a finite loss or gradient, and the layer. The arrays are as they were before it."""
    job.before(failed["step"] - 1)
    where = update.blame(place.state[PARAMETERS], failed["step"] - 1)
    return TrainError(
        f"[{job.task.options.COMMAND}] step {failed['step']}: loss {failed['loss']:g}, gradient norm {failed['grad_norm']:g}, "
        f"first in {where}; both must be finite. Checkpoints before it stay; start anew with a lower --learning-rate or "
        "--grad-clip"
    )


def _save(job: Job, place: Place, update: Update, group: Group) -> None:
    if group.rank:
        return
    job.saved(place.state[PARAMETERS])
    batch = update.batches(place.done).start
    facts = {
        **job.course, "trained_tokens": place.tokens, "position": job.position(batch),
        "random": {"seed": job.task.options.seed, "next_batch": batch},
    }  # fmt: skip
    checkpoint.save(job.checkpoints, place.done, place.state, facts)


class Meter:
    """Collects the values of steps while the device works ahead, and makes records of them."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._waiting: list[tuple[Tensors, dict[str, Any]]] = []
        self._begun = self._last = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the first step was asked for."""
        return time.monotonic() - self._begun

    def add(self, values: Tensors, entry: dict[str, Any]) -> None:
        """Take the values of one more step; at most two steps wait in the device's queue."""
        if self._waiting:
            mx.eval(self._waiting[-1][0])
        self._waiting.append((values, entry))

    def restart(self) -> None:
        """Leave out of the speed what passed since the last record."""
        self._last = time.monotonic()

    def read(self) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
        """Records of the steps since the last, up to the first whose loss or gradients are not finite; and that one's."""
        rows = [
            {**entry, **{name: float(np.array(x)) for name, x in values.items()}} for values, entry in self._waiting
        ]
        now, entries = time.monotonic(), []
        speed = sum(row["tokens"] for row in rows) / (now - self._last)
        self._waiting, self._last = [], now
        for row in rows:
            if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
                return entries, row
            self._place.tokens += round(row.pop("tokens"))
            more = {"trained_tokens": self._place.tokens, "tokens_per_second": speed, "seconds": now - self._begun}
            entries.append({**row, **more})
        return entries, None
