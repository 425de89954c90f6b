"""The three optimisers against arithmetic in float64 written out here, and the schedules at their corners."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

from bitnet_mlx.train import optimizer
from bitnet_mlx.train.schedule import learning_rate, weight_decay

LINEAR, TALL, NORM, EMBEDDING = (
    "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight", "model.norm.weight",
    "model.embed_tokens.weight",
)  # fmt: skip
SHAPES = {LINEAR: (3, 5), TALL: (6, 4), NORM: (4,), EMBEDDING: (6, 3)}


def orthogonal(x: np.ndarray) -> np.ndarray:
    """Five quintic Newton-Schulz steps (Jordan, 2024) on the singular values alone: the polynomial acts on each."""
    u, s, v = np.linalg.svd(x, full_matrices=False)
    s = s / (np.sqrt((s**2).sum()) + 1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ v


class Reference:
    """One array's rule, float64."""

    def __init__(self, kind: str, decay: float) -> None:
        self.kind, self.decay, self.m, self.v, self.t = kind, decay, 0.0, 0.0, 0

    def step(self, p: np.ndarray, g: np.ndarray, lr: float) -> np.ndarray:
        self.t += 1
        p = p - lr * self.decay * p
        if self.kind == "lion":
            direction = np.sign(0.9 * self.m + 0.1 * g)
            self.m = 0.99 * self.m + 0.01 * g
        elif self.kind == "muon":
            self.m = 0.95 * self.m + 0.05 * g
            direction = 0.2 * max(p.shape) ** 0.5 * orthogonal(0.05 * g + 0.95 * self.m)
        else:
            self.m, self.v = 0.9 * self.m + 0.1 * g, 0.95 * self.v + 0.05 * g * g
            direction = self.m / (1 - 0.9**self.t) / (np.sqrt(self.v / (1 - 0.95**self.t)) + 1e-8)
        return p - lr * direction


@pytest.mark.parametrize("name", optimizer.NAMES)
def test_steps_are_the_papers(name: str) -> None:
    """Decay on the linears alone; 12 steps, so that corrections and momenta matter."""
    rng = np.random.default_rng(0)
    theirs = {key: rng.standard_normal(shape) for key, shape in SHAPES.items()}
    state = optimizer.init(name, {key: mx.array(p.astype(np.float32)) for key, p in theirs.items()})
    linear = (LINEAR, TALL)
    rules = {
        key: Reference("adamw" if name == "muon" and key not in linear else name, 0.1 if key in linear else 0.0)
        for key in SHAPES
    }
    for step in range(12):
        gradients = {key: rng.standard_normal(shape).astype(np.float32) for key, shape in SHAPES.items()}
        given = {key: mx.array(g) for key, g in gradients.items()}
        state = optimizer.update(name, state, given, mx.array(0.5), optimizer.rates(step, 0.01, 0.1), mx.array(True))
        theirs = {key: rules[key].step(p, gradients[key].astype(np.float64) * 0.5, 0.01) for key, p in theirs.items()}
    for key, p in theirs.items():
        np.testing.assert_allclose(np.array(state["parameters"][key]), p, rtol=1e-4, atol=2e-5, err_msg=key)


def test_what_is_kept_is_what_the_rules_need() -> None:
    parameters = {key: mx.zeros(shape) for key, shape in SHAPES.items()}
    kept = {
        name: {part: set(named) for part, named in optimizer.init(name, parameters).items()} for name in optimizer.NAMES
    }
    every = set(SHAPES)
    assert kept["adamw"] == {"parameters": every, "m": every, "v": every}
    assert kept["lion"] == {"parameters": every, "m": every}
    assert kept["muon"] == {"parameters": every, "v": every, "m": {NORM, EMBEDDING}}


def test_the_norm_is_that_of_all_gradients_together() -> None:
    gradients = {"a": mx.array([3.0, 0.0]), "b": mx.array([[4.0], [12.0]])}
    assert mx.sqrt(optimizer.squares(gradients).sum()).item() == pytest.approx(13.0)


def test_schedules() -> None:
    rate = [learning_rate(step, 2.0, 101, 10) for step in range(101)]
    assert [*rate[:2], rate[9], rate[10]] == pytest.approx([0.2, 0.4, 2.0, 2.0])
    assert rate[55] == pytest.approx(2.0 * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * 0.5))))
    assert rate[100] == pytest.approx(0.02)
    assert [weight_decay(step, 0.1, 4) for step in range(4)] == [0.1, 0.1, 0.0, 0.0]
    assert learning_rate(0, 1.0, 1, 0) == 1.0
