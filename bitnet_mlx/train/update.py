"""One update: the gradients of a step's batches, summed in their order, clipped and applied.

A step whose loss or gradient is not finite changes nothing, nor does any after it: so the host may look at the losses of
several steps together, and still finds the arrays as they were before the step that failed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_map

from bitnet_mlx.train import optimizer
from bitnet_mlx.train.evaluate import compiled
from bitnet_mlx.train.group import Group
from bitnet_mlx.train.layerwise import deepest_not_finite, first_not_finite, put, seeded
from bitnet_mlx.train.loop_options import LoopOptions
from bitnet_mlx.train.optimizer import PARAMETERS, State, Tensors

_SUMS = "sums of the losses"  # beside the gradients; no parameter has a space in its name


class Part(NamedTuple):
    """One batch: what the loss takes, how much it counts among a step's batches, and the tokens learned from."""

    inputs: tuple[mx.array, ...]
    weight: float
    tokens: int


@dataclass(frozen=True)
class Task:
    """What is trained: model.model.layers are its layers.

    loss: of a batch's inputs; what is to be small, float32 [], as a sum over `weight`, and other sums to report, float32
    [names]. part: batch `index` of the run, counted from 0. compiles: the loss is a function of arrays alone.
    """

    options: LoopOptions
    model: Any
    loss: Callable[..., tuple[mx.array, mx.array]]
    part: Callable[[int], Part]
    names: tuple[str, ...] = ()
    compiles: bool = False


class Update:
    """Takes a task's steps, as one rank of a group."""

    def __init__(self, task: Task, group: Group) -> None:
        self._task, self._group, self._seed = task, group, 0
        self._one, self._apply = self._gradients, self._applied
        if task.compiles:
            self._one, self._apply = compiled(self._gradients), compiled(self._applied)

    def batches(self, step: int) -> range:
        """The numbers of a step's batches, in the order in which their gradients are summed."""
        count = self._task.options.grad_accumulation_steps * self._group.size
        return range(step * count, (step + 1) * count)

    def __call__(self, state: State, alive: mx.array, step: int, rates: mx.array) -> tuple[State, mx.array, mx.array]:
        """The state after a step counted from 0; whether all were finite so far, bool []; and float32 [3 + names]: the
        loss, the task's own, tokens learned from, and the gradients' norm."""
        return self._apply(state, alive, self.total(state[PARAMETERS], step), rates)

    def total(self, parameters: Tensors, step: int) -> Tensors:
        """The sums over a step's batches: gradients by name, and the losses."""
        total: Tensors | None = None
        own = self.batches(step)[self._group.rank :: self._group.size]
        for index in own:
            for found in self._group.in_order(self._run(self._one, parameters, index)):
                total = found if total is None else {name: total[name] + x for name, x in found.items()}
            if len(own) > 1:
                mx.eval(total)  # one batch's activations at a time
        assert total is not None
        return total

    def _run(self, function: Callable[..., Any], parameters: Tensors, index: int) -> Any:
        """A function of parameters, a batch's weight and tokens, and its inputs. Random numbers follow from the batch."""
        part = self._task.part(index)
        self._seed = self._task.options.seed * 1_000_003 + index
        return function(parameters, mx.array([part.tokens, part.weight], mx.float32), *part.inputs)

    def _loss(self, parameters: Tensors, *inputs: mx.array) -> tuple[mx.array, mx.array]:
        task = self._task
        put(task.model, parameters)
        with seeded(task.model, parameters, self._seed, task.options.grad_checkpoint):
            return task.loss(*inputs)

    def _gradients(self, parameters: Tensors, counts: mx.array, *inputs: mx.array) -> Tensors:
        (value, others), found = mx.value_and_grad(self._loss)(parameters, *inputs)
        return {**found, _SUMS: mx.concatenate([value[None], others, counts])}

    def _applied(
        self, state: State, alive: mx.array, total: Tensors, rates: mx.array
    ) -> tuple[State, mx.array, mx.array]:
        sums, options = total[_SUMS], self._task.options
        found = {name: g for name, g in total.items() if name != _SUMS}
        weight = sums[-1]
        norm = optimizer.global_norm(found) / weight
        alive = alive & mx.isfinite(sums[0]) & mx.isfinite(norm)
        scale = mx.minimum(1.0, options.grad_clip / (norm + 1e-6)) / weight
        new = optimizer.update(options.optimizer, state, found, scale, rates)
        new = tree_map(lambda after, before: mx.where(alive, after, before), new, state)
        values = mx.concatenate([sums[:-2] / weight, sums[-2:-1], norm[None]])
        return new, alive, values

    def blame(self, parameters: Tensors, step: int) -> str:
        """Where the first number that is not finite stands, in a step taken with these parameters."""
        for index in self.batches(step)[self._group.rank :: self._group.size]:

            def forward(index: int = index) -> mx.array:
                return self._run(lambda own, _, *inputs: self._loss(own, *inputs)[0], parameters, index)

            found = first_not_finite(self._task.model, forward, parameters)
            if found is None:
                gradients = self._run(self._gradients, parameters, index)
                found = deepest_not_finite({name: g for name, g in gradients.items() if name != _SUMS})
                found = f"the gradient of {found}" if found else None
            if found is not None:
                return found
        return "the sum of several batches" if self._group.size == 1 else "the batch of another rank"
