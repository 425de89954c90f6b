"""AdamW, Muon and Lion over a flat dictionary of parameters; every state is a plain array.

A step that is not wanted (see train/update.py) leaves everything as it is. Muon's and Lion's rule for one array is
mlx.optimizers' own. AdamW's stands here: its bias corrections are folded into its rate and its epsilon (Kingma and Ba, 2015,
section 2), which the host computes, and each of its three arrays is read and written once. Weight decay is decoupled for all
three, p - lr * decay * p, and acts on matrices alone. Muon takes the matrices, AdamW the rest of its run: norms, vectors and
embeddings (Jordan, 2024). Its update is scaled to the size of AdamW's, 0.2 sqrt(max(N, K)), so that one learning rate serves
both (Liu et al., 2025).
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.optimizers as rules

from bitnet_mlx.train.scalars import numbers

Tensors = dict[str, mx.array]
State = dict[str, Tensors]  # "parameters", and what the optimiser keeps of each: "m" and "v", of the same shape
PARAMETERS = "parameters"
NAMES = ("adamw", "muon", "lion")
BETA1, BETA2, EPS = 0.9, 0.95, 1e-8
_KEPT = {"adamw": ("m", "v"), "muon": ("v",), "lion": ("m",)}


def decays(name: str, parameter: mx.array) -> bool:
    """Weight decay acts on the linears alone: not on norms, not on embeddings."""
    return parameter.ndim == 2 and "embed_tokens" not in name


def _kind(optimizer: str, name: str, parameter: mx.array) -> str:
    return "adamw" if optimizer == "muon" and not decays(name, parameter) else optimizer


def init(optimizer: str, parameters: Tensors) -> State:
    """The state before the first step: what is kept is zero. optimizer: one of NAMES."""
    state: State = {PARAMETERS: parameters}
    for name, p in parameters.items():
        for part in _KEPT[_kind(optimizer, name, p)]:
            state.setdefault(part, {})[name] = mx.zeros_like(p)
    return state


def squares(gradients: Tensors) -> mx.array:
    """Sum of squares of each gradient, in the order of names, float32 [gradients]."""
    return mx.stack([mx.sum(mx.square(gradients[name])) for name in sorted(gradients)])


def rates(step: int, learning_rate: float, weight_decay: float) -> mx.array:
    """The array that `update` takes for a step counted from 0, float32 [5]: learning rate, rate times decay for matrices and for
    what is not decayed, and Adam's rate and epsilon with its bias corrections."""
    first, second = 1 - BETA1 ** (step + 1), (1 - BETA2 ** (step + 1)) ** 0.5
    adam = learning_rate * second / first
    return mx.array([learning_rate, learning_rate * weight_decay, 0.0, adam, EPS * second], mx.float32)


def update(
    optimizer: str, state: State, gradients: Tensors, scale: mx.array, rates: mx.array, alive: mx.array
) -> State:
    """One step. scale: float32 [], factor on the gradients (clipping). rates: see `rates`. alive: bool []; where it is False
    the state returned is the one given."""
    new: State = {part: {} for part in state}
    rate, decayed, none, adam_rate, adam_eps = numbers(rates)
    scales = numbers(mx.broadcast_to(scale, (2,)))
    for name, p in state[PARAMETERS].items():
        kind, g, decay = _kind(optimizer, name, p), gradients[name], decayed if decays(name, p) else none
        own = {part: state[part][name] for part in (PARAMETERS, *_KEPT[kind])}
        if kind == "adamw":
            after = _adamw(own, g, scales, alive, decay, adam_rate, adam_eps)
        else:
            after = _by_rule(kind, own, g * scale, decay, rate)
            after = {part: mx.where(alive, x, own[part]) for part, x in after.items()}
        for part, x in after.items():
            new[part][name] = x
    return new


def _adamw(
    own: Tensors, g: mx.array, scales: list[mx.array], alive: mx.array, decay: mx.array, rate: mx.array, eps: mx.array
) -> Tensors:
    # The gradient is scaled in both moments, by an array each: a product that both use would be written and read once more.
    p, m, v = own[PARAMETERS], own["m"], own["v"]
    m = mx.where(alive, BETA1 * m + (1 - BETA1) * (g * scales[0]), m)
    v = mx.where(alive, BETA2 * v + (1 - BETA2) * mx.square(g * scales[1]), v)
    p = mx.where(alive, p - decay * p - rate * m / (mx.sqrt(v) + eps), p)
    return {PARAMETERS: p, "m": m, "v": v}


def _by_rule(kind: str, own: Tensors, g: mx.array, decay: mx.array, rate: mx.array) -> Tensors:
    p, kept = own[PARAMETERS], {part: x for part, x in own.items() if part != PARAMETERS}
    rule: Any = rules.Muon(0.0, weight_decay=0.0) if kind == "muon" else rules.Lion(0.0)
    # MLX's Muon has sqrt(max(1, N / K)) already.
    rule.state["learning_rate"] = rate * (0.2 * p.shape[-1] ** 0.5) if kind == "muon" else rate
    p = rule.apply_single(g, p - decay * p, kept)
    return {PARAMETERS: p, **kept}
