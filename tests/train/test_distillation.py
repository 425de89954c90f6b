"""Distances from a teacher: torch's numbers, what passes inside, and teachers of another shape."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from bitnet_mlx.checkpoint.read import read_weights
from bitnet_mlx.errors import ConfigError
from bitnet_mlx.models.decoder_mlx import MlxModel
from bitnet_mlx.train.group import Group
from bitnet_mlx.train.insides import Looker
from bitnet_mlx.train.losses import (
    cosine_distance,
    distance,
    kept_distance,
    looked_at,
    relation_distance,
    squared_distance,
)
from bitnet_mlx.train.masters import trained
from bitnet_mlx.train.optimizer import PARAMETERS, init
from bitnet_mlx.train.qat import make_job, qat
from bitnet_mlx.train.qat_run import prepare
from bitnet_mlx.train.teacher import most_likely
from bitnet_mlx.train.update import Update
from tests.support import hf_folder, tiny_tokenizers
from tests.train.support import qat_options, silent

GOLDEN = np.load(Path(__file__).parent / "data" / "distill_torch.npz")
K, T = 5, 1.6  # as tests/oracle/make_distill_goldens.py has them


def given(name: str) -> tuple[mx.array, mx.array]:
    return mx.array(GOLDEN[f"{name}.t"]), mx.array(GOLDEN[f"{name}.s"])


def agrees(name: str, loss: Callable[..., mx.array], student: Sequence[mx.array]) -> None:
    """The loss to 1e-5 of itself; gradients to 1e-4 of each and 1e-5 of the largest."""
    value, found = mx.value_and_grad(loss, argnums=tuple(range(len(student))))(*student)
    assert value.item() == pytest.approx(float(GOLDEN[f"{name}.loss"]), rel=1e-5)
    for i, gradient in enumerate(found if isinstance(found, Sequence) else [found]):
        expected = GOLDEN[f"{name}.grad{i}"]
        np.testing.assert_allclose(np.array(gradient), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("name", "function"), [("cosine", cosine_distance), ("mse", squared_distance)])
def test_hidden_distances_are_torchs(name: str, function: Callable[..., mx.array]) -> None:
    t, s = given(name)
    agrees(name, lambda s: function(t, s), [s])
    assert function(t, t).item() == pytest.approx(0, abs=1e-6)


def test_the_distance_of_relations_is_torchs() -> None:
    """A teacher of 6 query heads of 8, a student of 4 of 5."""
    teacher, student = zip(*(given(f"relation.{name}") for name in "qkv"), strict=True)
    agrees("relation", lambda *own: relation_distance(teacher, own), student)
    assert relation_distance(student, student).item() == pytest.approx(0, abs=1e-6)


def test_the_distance_of_the_most_likely_tokens_is_torchs() -> None:
    t, s = given("kept")
    agrees("kept", lambda s: kept_distance(*most_likely(t, K, T), s, T).mean(), [s])
    whole, vocab = distance(t, s, T).mean().item(), t.shape[-1]
    assert kept_distance(*most_likely(t, vocab, T), s, T).mean().item() == pytest.approx(whole, rel=1e-5)
    below = [kept_distance(*most_likely(t, k, T), s, T).mean().item() for k in (1, K, vocab - 1)]
    assert 0 < below[0] < below[1] < below[2] < whole * 1.00001  # merging outcomes never adds to a KL


def test_a_looker_sees_what_passes(tmp_path: Path) -> None:
    hf_folder.write(tmp_path, "qwen3", "dense", num_hidden_layers=3, head_dim=18)
    model, ids = MlxModel(read_weights(tmp_path)), mx.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    insides = Looker(model, [0, 2], 1)(ids)
    assert mx.array_equal(model.project(insides.ready), model(ids)).item()
    x = model.model.embed_tokens.rows(ids).astype(mx.float32)
    rotation = model.model._rotary.at(None, 5)
    for i, layer in enumerate(model.layers):
        before, x = x, layer(x, "causal", None, rotation)
        if i == 1:
            out = mx.fast.scaled_dot_product_attention(*insides.states, scale=18**-0.5, mask="causal")
            own = layer.self_attn.o_proj(out.transpose(0, 2, 1, 3).reshape(2, 5, -1))
            inner = before + own
            gate = layer.post_attention_layernorm(inner)
            gate, up = layer.mlp.gate_proj(gate), layer.mlp.up_proj(gate)
            rebuilt = inner + layer.mlp.down_proj(gate * mx.sigmoid(gate) * up)
            np.testing.assert_allclose(np.array(x), np.array(rebuilt), rtol=2e-4, atol=2e-5)
        elif i in (0, 2):
            assert mx.array_equal(x, insides.hidden[i // 2]).item()


def test_layers_are_paired_by_depth(tmp_path: Path) -> None:
    options = qat_options(tmp_path, "out", hidden_weight=1.0, attention_weight=1.0)
    assert looked_at(options, 2) == ([0, 1], 1)
    assert looked_at(options, 2, 6) == ([2, 5], 5)
    assert looked_at(options, 4, 6) == ([1, 2, 4, 5], 5)
    assert looked_at(options, 4, 2) == ([0, 0, 1, 1], 1)
    second = qat_options(tmp_path, "out", attention_weight=1.0, attention_layer=2)
    assert looked_at(second, 4, 8) == ([], 3)
    with pytest.raises(ConfigError, match="the model has 1 layers"):
        looked_at(second, 1)


def first_step(place: Path, compiles: bool = False, **changes: Any) -> dict[str, mx.array]:
    """The gradient of each parameter in a step that is half blended."""
    work = prepare(qat_options(place, "out", blend_fraction=1.0, eval_data=(), **changes))
    job = make_job(work, Group(), compiles)
    job.before(3)
    return Update(job.task, Group()).total(init("adamw", trained(work.student))[PARAMETERS], 3)["gradients"]


def norm(x: mx.array) -> float:
    return float(mx.sqrt(mx.square(x).sum()).item())


def test_gradients_are_the_same_when_layers_are_computed_twice_and_blends_are_inputs(tmp_path: Path) -> None:
    changes: dict[str, Any] = dict(
        kl_weight=0.0, hidden_weight=3.0, attention_weight=2.0, attention_layer=1, sub_norms=True
    )
    once, twice = first_step(tmp_path, **changes), first_step(tmp_path, grad_checkpoint=True, **changes)
    given = first_step(tmp_path, True, grad_checkpoint=True, **changes)
    plain = first_step(tmp_path, kl_weight=0.0, sub_norms=True)
    assert once.keys() == twice.keys() == given.keys() == plain.keys()
    for name, gradient in once.items():
        assert mx.array_equal(twice[name], gradient), name
        assert norm(given[name]) == pytest.approx(norm(gradient), rel=1e-4), name
    name = "model.layers.0.self_attn.k_proj.weight"
    assert norm(once[name]) != pytest.approx(norm(plain[name]), rel=1e-3)


def test_a_run_on_all_losses_with_a_teacher_of_another_shape(tmp_path: Path) -> None:
    big = dict(num_hidden_layers=4, intermediate_size=160, vocab_size=420)
    for name, changes in (
        ("deep", {}),
        ("wide", {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}),
    ):
        hf_folder.write(tmp_path / name, "llama", "dense", seed=3, **{**big, **changes})
        tiny_tokenizers.byte_level(tmp_path / name)
    run = qat_options(
        tmp_path, "deep_out", teacher=str(tmp_path / "deep"), iters=12, eval_data=(), hidden_weight=4.0, hidden_loss="mse",
        attention_weight=2.0, blend="constant", learning_rate=3e-3,
    )  # fmt: skip
    qat(run, silent)
    entries = [json.loads(line) for line in (run.output / "log.jsonl").read_text().splitlines()]
    for entry in entries:
        parts = 0.5 * (entry["cross_entropy"] + entry["kl"]) + 4 * entry["hidden"] + 2 * entry["attention"]
        assert entry["loss"] == pytest.approx(parts, rel=1e-5)
    wide = str(tmp_path / "wide")
    with pytest.raises(ConfigError, match="the teacher's are 96 wide, the model's 72"):
        qat(qat_options(tmp_path, "wide_out", teacher=wide, hidden_weight=1.0), silent)
    record = qat(qat_options(tmp_path, "wide_out", teacher=wide, attention_weight=1.0, iters=2, eval_data=()), silent)
    assert np.isfinite(record["loss"])


@pytest.mark.parametrize("name", ["hidden", "attention"])
def test_a_student_comes_nearer_to_its_parents_insides(tmp_path: Path, name: str) -> None:
    weights: dict[str, Any] = {f"{name}_weight": 100.0}  # far above cross entropy, which pulls elsewhere
    run = qat_options(
        tmp_path, "out", iters=15, eval_data=(), blend="constant", learning_rate=3e-3, kl_weight=0.0, **weights
    )
    qat(run, silent)
    entries = [json.loads(line) for line in (run.output / "log.jsonl").read_text().splitlines()]
    assert np.mean([entry[name] for entry in entries[-5:]]) < 0.8 * entries[0][name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_weight": -1.0}, "--hidden-weight is -1.0"),
        ({"hidden_loss": "l1"}, "--hidden-loss is 'l1'"),
        ({"attention_layer": 0}, "--attention-layer is 0"),
        ({"teacher_top_k": 0}, "--teacher-top-k is 0"),
        ({"teacher_cache": Path("x"), "hidden_weight": 1.0}, "nothing of the teacher's insides"),
    ],
)
def test_what_is_not_allowed(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        qat_options(tmp_path, "out", **changes)
