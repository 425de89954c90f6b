"""One update: the gradients of a step's batches, summed in their order, clipped and applied.

A step whose loss or gradient is not finite changes nothing, nor does any after it: so the host may look at the losses of
several steps together, and still finds the arrays as they were before the step that failed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

Totals = dict[str, Tensors]  # "gradients" by name, "losses" by name, and "counts": the sums of tokens and weights


class Part(NamedTuple):
    """One batch: what the loss takes (arrays, or trees of them), how much it counts among a step's batches, and the
    tokens learned from."""

    inputs: tuple[Any, ...]
    weight: float
    tokens: int


@dataclass(frozen=True)
class Task:
    """What is trained: model.model.layers are its layers.

    loss: of a batch's inputs; "loss", which is to be small, and others to report, each float32 [] and a sum over `weight`.
    part: batch `index` of the run, counted from 0. compiles: whether the loss is a function of arrays alone, without random
    numbers.
    """

    options: LoopOptions
    model: Any
    loss: Callable[..., Tensors]
    part: Callable[[int], Part]
    compiles: bool = False


class Update:
    """Takes a task's steps, as one rank of a group."""

    def __init__(self, task: Task, group: Group) -> None:
        self._task, self._group, self._seed = task, group, 0
        self._one = compiled(self._gradients) if task.compiles else self._gradients
        self._squares, self._apply = compiled(optimizer.squares), compiled(self._applied)

    def batches(self, step: int) -> range:
        """The numbers of a step's batches, in the order in which their gradients are summed."""
        count = self._task.options.grad_accumulation_steps * self._group.size
        return range(step * count, (step + 1) * count)

    def __call__(self, state: State, alive: mx.array, step: int, rates: mx.array) -> tuple[State, mx.array, Tensors]:
        """The state after a step counted from 0; whether all was finite so far, bool []; and what to report, float32 []
        each: the losses, "tokens" learned from, and "grad_norm", the gradients' norm."""
        total = self.total(state[PARAMETERS], step)
        weight = total["counts"]["weight"]
        # Numbers are not compiled: see train/scalars.py.
        values = {name: value / weight for name, value in total["losses"].items()}
        norm = mx.sqrt(mx.sum(self._squares(total["gradients"]))) / weight
        alive = alive & mx.isfinite(values["loss"]) & mx.isfinite(norm)
        scale = mx.minimum(1.0, self._task.options.grad_clip / (norm + 1e-6)) / weight
        state = self._apply(state, alive, total["gradients"], scale, rates)
        return state, alive, {**values, "tokens": total["counts"]["tokens"], "grad_norm": norm}

    def total(self, parameters: Tensors, step: int) -> Totals:
        """The sums over a step's batches."""
        total: Totals | None = None
        own = self.batches(step)[self._group.rank :: self._group.size]
        for index in own:
            for found in self._group.in_order(self._run(self._one, parameters, index)):
                total = found if total is None else tree_map(mx.add, total, found)
            if len(own) > 1:
                mx.eval(total)  # one batch's activations at a time
        assert total is not None
        return total

    def _run(self, function: Callable[..., Any], parameters: Tensors, index: int) -> Any:
        """A function of parameters, a batch's tokens and weight, and its inputs. Random numbers follow from the batch."""
        part = self._task.part(index)
        self._seed = self._task.options.seed * 1_000_003 + index
        counts = {"tokens": mx.array(part.tokens, mx.float32), "weight": mx.array(part.weight, mx.float32)}
        return function(parameters, counts, *part.inputs)

    def _losses(self, parameters: Tensors, inputs: Sequence[Any], checkpoint: bool) -> Tensors:
        with seeded(self._task.model, parameters, self._seed, checkpoint):
            return self._task.loss(*inputs)

    def _loss(self, parameters: Tensors, *inputs: Any) -> tuple[mx.array, Tensors]:
        put(self._task.model, parameters)
        losses = self._losses(parameters, inputs, self._task.options.grad_checkpoint)
        return losses["loss"], losses

    def _gradients(self, parameters: Tensors, counts: Tensors, *inputs: Any) -> Totals:
        (_, losses), found = mx.value_and_grad(self._loss)(parameters, *inputs)
        if len(self.batches(0)) > 1:
            # A sum over an array follows its layout in memory, and what was gathered has lost that of a transposed product.
            found = {name: mx.contiguous(g) for name, g in found.items()}
        return {"gradients": found, "losses": losses, "counts": counts}

    def _applied(self, state: State, alive: mx.array, found: Tensors, scale: mx.array, rates: mx.array) -> State:
        return optimizer.update(self._task.options.optimizer, state, found, scale, rates, alive)

    def blame(self, parameters: Tensors, step: int) -> str:
        """Where the first number that is not finite stands, in a step taken with these parameters."""
        put(self._task.model, parameters)
        for index in self.batches(step)[self._group.rank :: self._group.size]:
            inputs = self._task.part(index).inputs

            def forward(inputs: Sequence[Any] = inputs) -> mx.array:
                return self._losses(parameters, inputs, checkpoint=False)["loss"]

            found = first_not_finite(self._task.model, forward, parameters)
            if found is not None:
                return found
            bad = deepest_not_finite(self._run(self._gradients, parameters, index)["gradients"])
            if bad is not None:
                return f"the gradient of {bad}"
        return "the sum of several batches" if self._group.size == 1 else "the batch of another rank"
