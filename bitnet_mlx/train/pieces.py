"""Losses over a wide vocabulary, of some positions at a time: never all logits at once, forward or backward.

A batch's logits in float32 may be larger than the model. So its positions are cut into pieces, as equal as can be, and each
piece is computed behind the one before. Where gradients are wanted, those of a piece are taken together with its loss:
nothing of it is kept, and nothing is computed twice. Those of the head's weights are summed in float32, in the order of the
pieces. The cut depends on shapes alone, and so does every bit that comes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from bitnet_mlx.models.decoder_mlx import MlxModel

BYTES = 1 << 27  # of a piece's logits in float32, at most: 261 positions of 128,256 tokens
Rows = dict[str, mx.array]  # by name, [positions, ...] each
Loss = Callable[[mx.array, Rows], tuple[mx.array, ...]]  # of logits [positions, V]: sums, float32 [] each


class Head(NamedTuple):
    """product: x [..., H] and the weights -> logits [..., width]. weights: float32, those that are trained, if any are; they
    are multiplied in the dtype of x."""

    product: Callable[..., mx.array]
    width: int
    weights: tuple[mx.array, ...] = ()

    def fixed(self, dtype: mx.Dtype) -> Callable[[mx.array], mx.array]:
        """x [..., H] of a dtype -> logits, the weights being what they are now."""
        weights = [w.astype(dtype) for w in self.weights]
        return lambda x: self.product(x, *weights)


def frozen(model: MlxModel) -> Head:
    """A model's own head, which is not trained."""
    return Head(model.project, model.config.vocab_size)


def cut(count: int, head: Head) -> list[slice]:
    """The pieces of `count` positions: one where all their logits are small. Each passes once over the gradient of the weights
    that are trained, and so may be as large as that."""
    most = max(BYTES, *(w.nbytes for w in head.weights)) if head.weights else BYTES
    pieces = max(1, min(count, -(-count * head.width * 4 // most)))
    size = -(-count // pieces)
    return [slice(at, min(at + size, count)) for at in range(0, count, size)]


def each(function: Callable[..., Sequence[mx.array]], head: Head, *rows: mx.array) -> list[mx.array]:
    """What a function of rows [positions, ...], which multiplies them with a head, gives: [positions, ...] each."""
    found: list[Sequence[mx.array]] = []
    for at in cut(rows[0].shape[0], head):
        found.append(function(*_behind([r[at] for r in rows], found[-1] if found else ())))
    return [mx.concatenate(list(parts)) for parts in zip(*found, strict=True)]


def sums(loss: Loss, head: Head, x: mx.array, rows: Rows) -> tuple[mx.array, ...]:
    """What `loss` gives, summed over x [positions, H] and rows; the first alone has a gradient, to x and the head's weights."""
    count = 1 + len(head.weights)

    def piece(x: mx.array, *rest: mx.array) -> tuple[mx.array, ...]:
        weights, own = rest[: count - 1], dict(zip(rows, rest[count - 1 :], strict=True))
        return loss(head.product(x, *weights), own)

    def values(x: mx.array, *weights: mx.array) -> tuple[mx.array, ...]:
        ready = [w.astype(x.dtype) for w in weights]
        total: list[mx.array] = []
        to_x: list[mx.array] = []
        to_weights: list[mx.array] = []
        for at in cut(x.shape[0], head):
            own = _behind([x[at], *(r[at] for r in rows.values())], [*total, *to_x[-1:], *to_weights])
            found, gradients = mx.value_and_grad(piece, argnums=list(range(count)))(own[0], *ready, *own[1:])
            dx, *dw = gradients if count > 1 else [gradients]
            wide = [g.astype(mx.float32) for g in dw]
            total = [a + b for a, b in zip(total, found, strict=True)] if total else list(found)
            to_weights = [a + b for a, b in zip(to_weights, wide, strict=True)] if to_weights else wide
            to_x.append(dx)
        return *total, mx.concatenate(to_x), *to_weights

    function: Any = mx.custom_function(values)

    @function.vjp
    def vjp(primals: Any, cotangents: Sequence[mx.array], outputs: Sequence[mx.array]) -> Any:
        given = primals if isinstance(primals, tuple) else (primals,)
        found = [(g * cotangents[0]).astype(p.dtype) for p, g in zip(given, outputs[-count:], strict=True)]
        return tuple(found) if count > 1 else found[0]

    return tuple(function(x, *head.weights)[:-count])


def _behind(arrays: list[mx.array], before: Sequence[mx.array]) -> list[mx.array]:
    """The same arrays, which are there once the others are: without it MLX would compute all pieces side by side."""
    return list(mx.depends(arrays, list(before))) if before else arrays
