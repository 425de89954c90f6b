"""A model's layers, each called through something else for a while: to be seeded, to be computed twice, or to be watched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from bitnet_mlx.train.optimizer import Tensors

Layer = Callable[..., mx.array]


def put(model: nn.Module, parameters: Tensors) -> None:
    """Set some of a model's arrays by full name."""
    model.update(tree_unflatten(list(parameters.items())))


@contextmanager
def through(model: Any, wrap: Callable[[int, Any], Layer]) -> Iterator[None]:
    """Inside, layer i is called as wrap(i, layer). No array may be looked up by name meanwhile."""
    body = model.model
    layers, compiled = body.layers, getattr(body, "_compiled", None)
    body.layers = [wrap(i, layer) for i, layer in enumerate(layers)]
    body._compiled = None  # it would look into the layers
    try:
        yield
    finally:
        body.layers, body._compiled = layers, compiled


@contextmanager
def seeded(model: Any, parameters: Tensors, seed: int, checkpoint: bool) -> Iterator[None]:
    """Inside, a layer's random numbers (dropout) follow from `seed` and its place alone.

    checkpoint: a layer keeps its input alone, and what is in between is computed again for its gradient.
    parameters: those that gradients are taken of, by full name ("model.layers.0...").
    """

    def wrap(index: int, layer: nn.Module) -> Layer:
        def call(own: Tensors, x: mx.array, *rest: Any) -> mx.array:
            if checkpoint:
                put(layer, own)  # the second time these are other arrays
            mx.random.seed(seed * len(model.model.layers) + index)
            # One array of its own: what the layer's parts send back is summed before anything else that looks at x, as in a
            # checkpoint.
            return layer(mx.contiguous(x), *rest)

        prefix = f"model.layers.{index}."
        own = {name.removeprefix(prefix): p for name, p in parameters.items() if name.startswith(prefix)}
        return partial(mx.checkpoint(call) if checkpoint else call, own)

    with through(model, wrap):
        yield


def first_not_finite(model: Any, forward: Callable[[], mx.array], parameters: Tensors) -> str | None:
    """Where a number first is not finite when `forward` runs: among the parameters, in what a layer returns, or at the end.

    None where all are finite.
    """
    bad = [name for name, p in parameters.items() if not _finite(p)]
    if bad:
        return f"the weights of {min(bad, key=depth)}"
    seen: list[str] = []

    def wrap(index: int, layer: Any) -> Layer:
        def call(x: mx.array, *rest: Any) -> mx.array:
            if not seen and not _finite(x):
                seen.append("the embedding" if not index else f"the output of model.layers.{index - 1}")
            y = layer(x, *rest)
            if not seen and not _finite(y):
                seen.append(f"the output of model.layers.{index}")
            return y

        return call

    with through(model, wrap):
        value = forward()
    return seen[0] if seen else None if _finite(value) else "the logits or the loss"


def deepest_not_finite(gradients: Tensors) -> str | None:
    """The gradient that is not finite and lies nearest to the output, where a backward pass begins."""
    bad = [name for name, g in gradients.items() if not _finite(g)]
    return max(bad, key=depth) if bad else None


def depth(name: str) -> tuple[int, int, str]:
    """How far from the input a parameter lies, for sorting: the embedding, layers by number, what comes after them."""
    parts = name.split(".")
    if "layers" in parts:
        return 1, int(parts[parts.index("layers") + 1]), name
    return (0 if "embed_tokens" in parts else 2), 0, name


def _finite(x: mx.array) -> bool:
    return bool(mx.isfinite(x).all().item())
