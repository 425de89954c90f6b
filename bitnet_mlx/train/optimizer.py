"""AdamW, Muon and Lion over a flat dictionary of parameters; every state is a plain array.

The rule for one array is mlx.optimizers' own. Weight decay is decoupled for all three, p - lr * decay * p, and acts on
matrices alone. Muon takes the matrices, AdamW the rest of its run: norms, vectors and embeddings (Jordan, 2024). Its update
is scaled to the size of AdamW's, 0.2 sqrt(max(N, K)), so that one learning rate serves both (Liu et al., 2025).
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.optimizers as rules

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


def global_norm(gradients: Tensors) -> mx.array:
    """Root of the sum of squares of all gradients, float32 []."""
    return mx.sqrt(mx.sum(squares(gradients)))


def rates(step: int, learning_rate: float, weight_decay: float) -> mx.array:
    """The array that `update` takes for a step counted from 0: learning rate, weight decay, steps with this one."""
    return mx.array([learning_rate, weight_decay, step + 1], mx.float32)


def update(optimizer: str, state: State, gradients: Tensors, scale: mx.array, rates: mx.array) -> State:
    """One step. scale: float32 [], factor on the gradients (clipping). rates: see `rates`. Returns the new state."""
    new: State = {part: {} for part in state}
    made: dict[str, Any] = {}
    for name, p in state[PARAMETERS].items():
        kind = _kind(optimizer, name, p)
        rule = made.setdefault(kind, _rule(kind))
        factor = 0.2 * p.shape[-1] ** 0.5 if kind == "muon" else 1.0  # MLX's rule has sqrt(max(1, N / K)) already
        rule.state["learning_rate"], rule.state["step"] = rates[0] * factor, rates[2]
        own = {part: state[part][name] for part in _KEPT[kind]}
        start = p - rates[0] * rates[1] * p if decays(name, p) else p
        new[PARAMETERS][name] = rule.apply_single(gradients[name] * scale, start, own)
        for part, kept in own.items():
            new[part][name] = kept
    return new


def _rule(kind: str) -> Any:
    if kind == "muon":
        return rules.Muon(0.0, weight_decay=0.0)
    if kind == "lion":
        return rules.Lion(0.0)
    return rules.AdamW(0.0, betas=[BETA1, BETA2], eps=EPS, weight_decay=0.0, bias_correction=True)
