"""AdamW against MLX's own, and the schedules at their corners."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.optimizers
import numpy as np
import pytest

from bitnet_mlx.train import optimizer
from bitnet_mlx.train.schedule import learning_rate, weight_decay

NAMES = ("model.layers.0.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight")


def test_steps_equal_mlx_adamw() -> None:
    """Decay on the linear alone; 12 steps, so that the bias corrections matter."""
    rng = np.random.default_rng(0)
    shapes = {NAMES[0]: (5, 3), NAMES[1]: (4,), NAMES[2]: (6, 3)}
    mine = {name: mx.array(rng.standard_normal(shape).astype(np.float32)) for name, shape in shapes.items()}
    theirs = dict(mine)
    first, second = optimizer.init(mine)
    others = {
        name: mlx.optimizers.AdamW(
            0.01, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.1 if name == NAMES[0] else 0.0, bias_correction=True
        )
        for name in NAMES
    }
    for step in range(12):
        gradients = {name: mx.array(rng.standard_normal(shape).astype(np.float32)) for name, shape in shapes.items()}
        mine, first, second = optimizer.update(
            mine, first, second, gradients, mx.array(0.5), optimizer.rates(step, 0.01, 0.1)
        )
        for name, other in others.items():
            theirs[name] = other.apply_gradients({"w": gradients[name] * 0.5}, {"w": theirs[name]})["w"]
    for name in NAMES:
        np.testing.assert_allclose(np.array(mine[name]), np.array(theirs[name]), rtol=2e-5, atol=2e-6)


def test_the_norm_is_that_of_all_gradients_together() -> None:
    gradients = {"a": mx.array([3.0, 0.0]), "b": mx.array([[4.0], [12.0]])}
    assert optimizer.global_norm(gradients).item() == pytest.approx(13.0)


def test_schedules() -> None:
    rate = [learning_rate(step, 2.0, 101, 10) for step in range(101)]
    assert [*rate[:2], rate[9], rate[10]] == pytest.approx([0.2, 0.4, 2.0, 2.0])
    assert rate[55] == pytest.approx(2.0 * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * 0.5))))
    assert rate[100] == pytest.approx(0.02)
    assert [weight_decay(step, 0.1, 4) for step in range(4)] == [0.1, 0.1, 0.0, 0.0]
    assert learning_rate(0, 1.0, 1, 0) == 1.0
