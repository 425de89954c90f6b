"""`train --teacher`: the loss is the stated one, the student comes nearer to its teacher, other vocabularies are refused."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from bitnet_mlx.errors import ConfigError
from bitnet_mlx.train.data import Windows
from bitnet_mlx.train.evaluate import master_model
from bitnet_mlx.train.loop import initial_model, read_teacher, train
from bitnet_mlx.train.prepare import prepare
from tests.train.support import options, silent, write_texts


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The texts, and a float twin trained on them for a while."""
    data = write_texts(tmp_path_factory.mktemp("texts"))
    out = tmp_path_factory.mktemp("twin") / "model"
    train(options(data, out, iters=60, quantise=False, vocab_size=290), silent)
    return data, out


def log_softmax(x: np.ndarray) -> np.ndarray:
    top = x.max(-1, keepdims=True)
    return x - top - np.log(np.exp(x - top).sum(-1, keepdims=True))


def test_the_loss_is_the_stated_one(twin: tuple[Path, Path], tmp_path: Path) -> None:
    """The first step's, against float64 arithmetic on both models' logits."""
    data, teacher = twin
    taught = options(data, tmp_path / "one", iters=1, model=teacher, teacher=teacher, kl_weight=0.75, temperature=0.25)
    dataset = prepare(taught)
    starts = Windows(len(dataset.ids), taught.seq_length, taught.batch_size, taught.seed).starts(0)
    batch = dataset.ids[starts[:, None] + np.arange(taught.seq_length + 1)].astype(np.int32)
    student, _ = initial_model(taught, dataset)
    student.update(master_model(teacher, taught.seq_length).parameters())  # type: ignore[arg-type]
    inputs = mx.array(batch[:, :-1])
    said, asked = (np.array(model(inputs)).astype(np.float64) for model in (master_model(teacher, 32), student))
    entropy = -np.take_along_axis(log_softmax(asked), batch[:, 1:, None].astype(np.int64), -1).mean()
    p, q = log_softmax(said / 0.25), log_softmax(asked / 0.25)
    kl = 0.25**2 * (np.exp(p) * (p - q)).sum(-1).mean()
    train(taught, silent)
    [entry] = [json.loads(line) for line in (taught.output / "log.jsonl").read_text().splitlines()]
    assert kl > 1e-3  # ternary weights are not the teacher's
    assert entry["loss"] == pytest.approx(0.25 * entropy + 0.75 * kl, abs=2e-5)


def test_a_taught_student_comes_nearer(twin: tuple[Path, Path], tmp_path: Path) -> None:
    data, teacher = twin
    taught = options(data, tmp_path / "taught", iters=25, model=teacher, teacher=teacher, kl_weight=1.0)
    train(taught, silent)
    losses = [json.loads(line)["loss"] for line in (taught.output / "log.jsonl").read_text().splitlines()]
    assert np.mean(losses[-5:]) < 0.5 * losses[0]


def test_another_tokenizer_is_refused(twin: tuple[Path, Path], tmp_path: Path) -> None:
    data, teacher = twin
    with pytest.raises(ConfigError, match="another tokenizer"):
        train(options(data, tmp_path / "other", iters=1, teacher=teacher, vocab_size=280), silent)
    taught = options(data, tmp_path / "other", teacher=teacher, model=teacher)
    with pytest.raises(ConfigError, match="logits are 290 wide, the model's 999"):
        read_teacher(taught, prepare(taught), 999)


def test_shares_outside_0_to_1_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kl-weight"):
        options(tmp_path, tmp_path, kl_weight=1.5)
