"""What a student is trained on: the targets, and its distances from a teacher, by output and by what passes inside.

    loss = (1 - k) cross entropy + k T^2 KL(teacher || student) + h hidden + a attention

KL is of the distributions at temperature T (Hinton et al., 2015). hidden compares the residual stream behind each layer with
the teacher's as deep: 1 - cosine of the two vectors, or their squared difference over the teacher's mean square. attention
compares one layer's relations (MiniLMv2, Wang et al., 2021): of queries among themselves, of keys, and of values, each head's
softmax(S S^T / sqrt(D)) over the positions so far, by their KL from the teacher's, the mean of the three. All are means over
positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from math import gcd
from typing import Any, cast

import mlx.core as mx

from bitnet_mlx.errors import ConfigError
from bitnet_mlx.models.decoder_mlx import MlxModel
from bitnet_mlx.train.insides import Looker
from bitnet_mlx.train.optimizer import Tensors
from bitnet_mlx.train.pieces import Head, Rows, each, frozen, sums
from bitnet_mlx.train.qat_options import QatOptions
from bitnet_mlx.train.scalars import alone

Signal = dict[str, Any]  # what a teacher gives for a batch: arrays, and lists of them


def distance(teacher: mx.array, student: mx.array, temperature: float) -> mx.array:
    """T^2 KL(teacher || student) of logits [..., V] at a temperature, float32 [...]. The teacher has no gradient."""
    return cast(mx.array, _distance(temperature)(teacher, student))


@cache
def _distance(temperature: float) -> Callable[..., mx.array]:
    def values(teacher: mx.array, student: mx.array) -> mx.array:
        p, q = (log_softmax(_cooled(x, temperature)) for x in (teacher, student))
        return _times(temperature**2, _divergence(p, q))

    function: Any = mx.custom_function(values)

    @function.vjp
    def vjp(primals: tuple[mx.array, ...], cotangent: mx.array, _output: mx.array) -> tuple[mx.array, ...]:
        # T (softmax(student) - softmax(teacher)); what autograd finds passes over [..., V] several times more.
        p, q = (mx.softmax(_cooled(x, temperature), axis=-1) for x in primals)
        found = _times(temperature, cotangent)[..., None] * (q - p)
        return mx.zeros_like(primals[0]), found.astype(primals[1].dtype)

    return function


def _cooled(logits: mx.array, temperature: float) -> mx.array:
    wide = logits.astype(mx.float32)
    return wide if temperature == 1 else wide / temperature


def _times(factor: float, x: mx.array) -> mx.array:
    return x if factor == 1 else factor * x


def kept_distance(
    values: mx.array, indices: mx.array, rest: mx.array, student: mx.array, temperature: float
) -> mx.array:
    """The same where of the teacher only the K most likely tokens are known, all others being one outcome together.

    values: float32 [..., K], logarithms of their probabilities at the temperature. indices: the tokens, uint32 [..., K].
    rest: float32 [...], that of all others. It is at most the KL of the whole distributions, and equal to it where K = V.
    """
    logits = student.astype(mx.float32) / temperature
    q = log_softmax(logits)
    kl = _divergence(values, mx.take_along_axis(q, indices, axis=-1))
    if indices.shape[-1] < student.shape[-1]:
        others = mx.logsumexp(mx.put_along_axis(q, indices, mx.array(-mx.inf), axis=-1), axis=-1)
        kl = kl + mx.exp(rest) * (rest - others)
    return temperature**2 * kl


def cosine_distance(teacher: mx.array, student: mx.array) -> mx.array:
    """1 - the cosine of vectors [..., H], the mean over positions, float32 []."""
    t, s = teacher.astype(mx.float32), student.astype(mx.float32)
    norms = mx.sqrt((t * t).sum(axis=-1)) * mx.sqrt((s * s).sum(axis=-1))
    return (1 - (t * s).sum(axis=-1) / mx.maximum(norms, 1e-8)).mean()


def squared_distance(teacher: mx.array, student: mx.array) -> mx.array:
    """The mean squared difference of [..., H] over the teacher's mean square, float32 []."""
    t, s = teacher.astype(mx.float32), student.astype(mx.float32)
    return mx.square(s - t).mean() / mx.maximum(mx.square(t).mean(), 1e-8)


KEPT = ("values", "indices", "rest")  # of a signal, what `kept_distance` takes
HIDDEN: dict[str, Callable[[mx.array, mx.array], mx.array]] = {"cosine": cosine_distance, "mse": squared_distance}


def relation_distance(teacher: Sequence[mx.array], student: Sequence[mx.array]) -> mx.array:
    """The distance of attention's relations; q, k and v [B, heads, L, D] of each, whose heads and D may differ, float32 [].

    Each kind is cut into as many heads as divide both models'.
    """
    total = mx.array(0.0)
    for theirs, own in zip(teacher, student, strict=True):
        heads = gcd(theirs.shape[1], own.shape[1])
        total = total + _divergence(_relations(theirs, heads), _relations(own, heads)).mean()
    return total / len(teacher)


def _relations(states: mx.array, heads: int) -> mx.array:
    """[B, any, L, D] -> logarithms of the relations, float32 [B, heads, L, L]; positions to come have no share."""
    b, _, length, _ = states.shape
    flat = states.astype(mx.float32).transpose(0, 2, 1, 3).reshape(b, length, heads, -1).transpose(0, 2, 1, 3)
    scores = flat @ flat.swapaxes(-1, -2) * flat.shape[-1] ** -0.5
    return log_softmax(mx.where(mx.tri(length, dtype=mx.bool_), scores, -1e9))


def log_softmax(x: mx.array) -> mx.array:
    """Logarithms of the probabilities that logits [..., N] stand for."""
    return x - mx.logsumexp(x, axis=-1, keepdims=True)


def _divergence(p: mx.array, q: mx.array) -> mx.array:
    """KL of logarithms of probabilities [..., N] -> [...]."""
    return (mx.exp(p) * (p - q)).sum(axis=-1)


def looked_at(options: QatOptions, layers: int, others: int | None = None) -> tuple[list[int], int | None]:
    """The layers whose hidden states are compared, and the one whose q, k and v are, of a student of so many layers.

    others: of its teacher, whose layers are returned, each as deep. Raises ConfigError where the student has no such layer.
    """
    at = layers if options.attention_layer is None else options.attention_layer
    if at > layers:
        raise ConfigError(f"[qat] --attention-layer is {at}; the model has {layers} layers, counted from 1")

    def deep(layer: int) -> int:
        """The layer of `others` that lies as deep."""
        return layer if others is None else -(-(layer + 1) * others // layers) - 1

    hidden = [deep(layer) for layer in range(layers)] if options.hidden_weight else []
    return hidden, deep(at - 1) if options.attention_weight else None


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """In nats, of token ids [...] given logits [..., V], float32 [...]. MLX's CPU device sums in the dtype of logits."""
    wide = logits if mx.default_device() == mx.gpu else logits.astype(mx.float32)
    return mx.fast.cross_entropy(wide, targets)


def output_losses(
    head: Head,
    ready: mx.array,
    rows: Rows,
    scale: float,
    k: float = 0.0,
    temperature: float = 1.0,
    teacher: Head | None = None,
) -> Tensors:
    """Of a batch's outputs the "loss", "cross_entropy" and "kl" (0 where k is): sums over positions times `scale`, float32 [].

    ready: what the head multiplies, [B, L, H]. rows, [B, L, ...] each: "targets", token ids; "counts", float32, how much a
    position counts, 1 where it is left out; with k above 0 KEPT, or what the teacher's head multiplies, as "ready".
    "loss" alone has a gradient.
    """
    said = teacher.fixed(rows["ready"].dtype) if teacher is not None else None

    def loss(logits: mx.array, rows: Rows) -> tuple[mx.array, ...]:
        def total(each: mx.array) -> mx.array:
            return (each * rows["counts"] if "counts" in rows else each).sum()

        def share(factor: float, x: mx.array) -> mx.array:
            return alone(factor * x)

        entropy = total(cross_entropy(logits, rows["targets"]))
        if not k:
            return share(scale, entropy), share(scale, entropy), mx.array(0.0)
        if said is not None:
            kl = total(distance(said(rows["ready"]), logits, temperature))
        else:
            values, indices, rest = (rows[name] for name in KEPT)
            kl = total(kept_distance(values, indices, rest, logits, temperature))
        loss = share((1 - k) * scale, entropy) + share(k * scale, kl)
        return loss, share(scale, entropy), share(scale, kl)

    flat = {name: x.flatten(0, 1) for name, x in rows.items()}
    found = sums(loss, head, ready.flatten(0, 1), flat)
    return dict(zip(("loss", "cross_entropy", "kl"), found, strict=True))


def token_losses(head: Head, ready: mx.array, targets: mx.array) -> mx.array:
    """Cross entropy in nats of each target [B, L], float32 [B, L], for evaluation. ready: see `output_losses`."""
    logits = head.fixed(ready.dtype)

    def loss(x: mx.array, targets: mx.array) -> list[mx.array]:
        return [cross_entropy(logits(x), targets)]

    return each(loss, head, ready.flatten(0, 1), targets.flatten())[0].reshape(targets.shape)


class Losses:
    """The loss of a student, in its parts."""

    def __init__(self, student: MlxModel, options: QatOptions, teacher: Callable[[], MlxModel]) -> None:
        """teacher: called where a signal says what its head multiplies."""
        self._options, self._student, self._teacher = options, student, teacher
        self._look = Looker(student, *looked_at(options, len(student.layers)))

    def __call__(self, batch: mx.array, signal: Signal) -> Tensors:
        """int32 [B, L + 1] -> "loss", which is trained on, "cross_entropy", "kl" (0 where it is not used), and "hidden" and
        "attention" where they are, each float32 [].

        signal: what the teacher gives for batch[:, :-1] (train/teacher.py).
        """
        options = self._options
        own = self._look(batch[:, :-1])
        rows = {"targets": batch[:, 1:], **{name: signal[name] for name in ("ready", *KEPT) if name in signal}}
        teacher = frozen(self._teacher()) if "ready" in signal else None
        parts = output_losses(
            frozen(self._student),
            own.ready,
            rows,
            1 / rows["targets"].size,
            options.kl_weight,
            options.temperature,
            teacher,
        )
        if options.hidden_weight:
            pairs = zip(signal["hidden"], own.hidden, strict=True)
            parts["hidden"] = mx.stack([HIDDEN[options.hidden_loss](*pair) for pair in pairs]).mean()
            parts["loss"] = parts["loss"] + options.hidden_weight * parts["hidden"]
        if options.attention_weight:
            parts["attention"] = relation_distance(signal["states"], own.states)
            parts["loss"] = parts["loss"] + options.attention_weight * parts["attention"]
        return parts
