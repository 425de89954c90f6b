"""Several samples in a row: each as if it were alone."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from bitnet_mlx.checkpoint.adapter_mlx import AdapterConfig, attach
from bitnet_mlx.models.decoder_mlx import MlxModel
from bitnet_mlx.train.batches import Batches, batch
from bitnet_mlx.train.group import Group
from bitnet_mlx.train.lora import summed_loss
from bitnet_mlx.train.lora_options import LoraOptions
from bitnet_mlx.train.packed import SideBySide, rows_of
from bitnet_mlx.train.samples import Sample
from bitnet_mlx.train.update import Part, Task, Update
from tests.support.random_model import random_weights, tiny_config


def samples(lengths: tuple[int, ...], seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    return [Sample(rng.integers(1, tiny_config().vocab_size, n).astype(np.int32), n // 3) for n in lengths]


@pytest.fixture(scope="module")
def model() -> MlxModel:
    """Layers that do not quantise activations: no code may flip between two orders of a sum."""
    return MlxModel(random_weights(replace(tiny_config(), activation_bits=16), seed=3))


def test_rows_are_full_and_hold_every_sample_once() -> None:
    given = samples((9, 3, 14, 5, 5, 30, 2, 8, 11, 4))
    rows = rows_of(given, 30)
    assert sorted(id(s) for row in rows for s in row) == sorted(map(id, given))
    fill = [sum(len(s.ids) - 1 for s in row) for row in rows]
    assert len(rows) == 3 and max(fill) <= 30 and sum(fill) == sum(len(s.ids) - 1 for s in given)
    assert Batches.of(given, 2, 0, 30).rows == 3 and Batches.of(given, 2, 0).rows == 10


def test_loss_and_gradients_are_those_of_separate_samples(model: MlxModel) -> None:
    given = samples((9, 14, 5, 30, 11))
    mx.random.seed(0)
    parameters = attach(model, AdapterConfig(num_layers=2, rank=2))
    parameters = {name: mx.random.normal(p.shape) * 0.1 for name, p in parameters.items()}
    model.train()
    found = []
    for width in (0, 60):
        group = Batches.of(given, 9, 0, width)
        assert batch(group.groups[0]).packed is bool(width) and len(group.groups[0]) == (2 if width else 5)

        def part(index: int, group: Batches = group) -> Part:
            one = group.at(index)
            return Part((one,), one.tokens, one.tokens)

        for recompute in (False, True):
            options = LoraOptions(data=".", train=True, grad_checkpoint=recompute)  # type: ignore[arg-type]
            task = Task(options, model, lambda one: {"loss": summed_loss(model, one)}, part)
            found.append(Update(task, Group()).total(parameters, 0))
    first = found[0]
    for other in found[1:]:
        assert (
            other["counts"]["weight"].item()
            == first["counts"]["weight"].item()
            == sum(n - n // 3 for n in (9, 14, 5, 30, 11))
        )
        assert other["losses"]["loss"].item() == pytest.approx(first["losses"]["loss"].item(), rel=1e-6)
        for name, g in first["gradients"].items():
            top = float(abs(g).max().item())
            assert top > 0
            np.testing.assert_allclose(np.array(other["gradients"][name]), np.array(g), rtol=0, atol=1e-4 * top)


def test_no_sample_sees_another(model: MlxModel) -> None:
    """To the last bit: other tokens in the first sample change nothing in the second, nor in what follows it."""
    first, other, second, third = samples((7, 7, 9, 6), seed=5)
    model.train()
    logits = []
    for row in ((first, second, third), (other, second, third)):
        part = batch([row])
        logits.append(
            np.array(model(mx.array(part.inputs), [SideBySide(part.places, part.positions)] * len(model.layers)))
        )
    before, rest = slice(0, 6), slice(6, 19)
    assert not np.array_equal(logits[0][0, before], logits[1][0, before])
    assert np.array_equal(logits[0][0, rest], logits[1][0, rest])
    alone = np.array(model(mx.array(second.ids[None, :-1])))
    np.testing.assert_allclose(logits[0][0, 6:14], alone[0], rtol=0, atol=1e-4 * np.abs(alone).max())


def test_a_sample_that_just_fits_is_put_in() -> None:
    samples = [Sample(np.arange(length, dtype=np.int32), 0) for length in (5, 5, 6, 4)]
    rows = rows_of(samples, 8)
    assert sorted(sorted(len(s.ids) for s in row) for row in rows) == [[4, 6], [5, 5]]
