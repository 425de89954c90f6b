"""AdamW with decoupled weight decay over a flat dictionary of parameters; every state is a plain array."""

from __future__ import annotations

import mlx.core as mx

Tensors = dict[str, mx.array]
BETA1, BETA2, EPS = 0.9, 0.95, 1e-8


def init(parameters: Tensors) -> tuple[Tensors, Tensors]:
    """First and second moments, zero."""
    return ({k: mx.zeros_like(p) for k, p in parameters.items()}, {k: mx.zeros_like(p) for k, p in parameters.items()})


def decays(name: str, parameter: mx.array) -> bool:
    """Weight decay acts on the linears alone: not on norms, not on embeddings."""
    return parameter.ndim == 2 and "embed_tokens" not in name


def global_norm(gradients: Tensors) -> mx.array:
    """Root of the sum of squares of all gradients, float32 []."""
    return mx.sqrt(sum((mx.sum(mx.square(gradients[k])) for k in sorted(gradients)), start=mx.array(0.0)))


def update(
    parameters: Tensors, first: Tensors, second: Tensors, gradients: Tensors, scale: mx.array, rates: mx.array
) -> tuple[Tensors, Tensors, Tensors]:
    """One AdamW step. scale: factor on the gradients (clipping). rates: float32 [4] of learning rate, weight decay,
    and the two bias corrections 1 - beta^t. Returns new parameters and moments."""
    lr, decay, c1, c2 = rates[0], rates[1], rates[2], rates[3]
    p2, m2, v2 = {}, {}, {}
    for name, p in parameters.items():
        g = gradients[name] * scale
        m2[name] = BETA1 * first[name] + (1 - BETA1) * g
        v2[name] = BETA2 * second[name] + (1 - BETA2) * (g * g)
        step = (m2[name] / c1) / (mx.sqrt(v2[name] / c2) + EPS)
        if decays(name, p):
            step = step + decay * p
        p2[name] = p - lr * step
    return p2, m2, v2


def rates(step: int, learning_rate: float, weight_decay: float) -> mx.array:
    """The array that `update` takes for a step counted from 0."""
    t = step + 1
    return mx.array([learning_rate, weight_decay, 1 - BETA1**t, 1 - BETA2**t], mx.float32)
