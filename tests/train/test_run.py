"""A whole small run: it learns, it goes on exactly, it writes what the readers read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from bitnet_mlx.api import load
from bitnet_mlx.checkpoint.read import read_weights
from bitnet_mlx.errors import BitnetError, ConfigError, FormatError, TrainError
from bitnet_mlx.models.decoder_numpy import NumpyDecoder
from bitnet_mlx.quality.bits import total_nats
from bitnet_mlx.train import checkpoint, evaluate, optimizer, run
from bitnet_mlx.train.export import pack, read_master
from bitnet_mlx.train.group import Group
from bitnet_mlx.train.loop import train
from bitnet_mlx.train.optimizer import State
from bitnet_mlx.train.run import Meter, Place
from bitnet_mlx.train.update import Part, Task, Update
from tests.train.support import options, silent, write_texts


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A finished run of 60 steps and its record."""
    out = tmp_path_factory.mktemp("run") / "model"
    return out, train(options(data, out, iters=60, eval_fraction=0.2, save_every=25), silent)


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[tuple[int, float, float]]:
    return [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in log(folder)]


def test_the_loss_falls(trained: tuple[Path, dict[str, Any]]) -> None:
    out, record = trained
    entries = log(out)
    assert len(entries) == 60 == record["steps"]
    assert np.mean([e["loss"] for e in entries[-5:]]) < 0.6 * entries[0]["loss"]
    assert record["bits_per_byte"] < 3.5
    assert [e["trained_tokens"] for e in entries] == [2 * 32 * step for step in range(1, 61)]
    weights = mx.load(str(out / "model.safetensors"))
    assert record["tokens"] == 60 * 2 * 32 and record["finished"] and record["output"] == str(out)
    assert record["parameters"] == sum(array.size for array in weights.values())  # type: ignore[union-attr]
    facts = json.loads((out / "checkpoints" / "step-00000060" / "trainer.json").read_text())
    assert facts["step"] == 60 and facts["random"] == {"seed": 0, "next_batch": 60}
    assert facts["trained_tokens"] == record["tokens"] and facts["position"].keys() == {"epoch", "window"}
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-00000050", "step-00000060"]


def test_the_folder_is_what_readers_expect(trained: tuple[Path, dict[str, Any]]) -> None:
    out, _ = trained
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["BitNetForCausalLM"] and config["model_type"] == "bitnet"
    assert config["quantization_config"] == {
        "quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online",
        "modules_to_not_convert": ["lm_head"],
    }  # fmt: skip
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 0
    files = {p.name for p in out.iterdir() if p.is_file()}
    assert files == {
        "config.json", "generation_config.json", "log.jsonl", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    model, tokenizer = load(out, backend="numpy")
    ids = tokenizer.encode("def path_name(path, name):\n")
    assert model.step([ids], [model.make_cache()])[0].shape == (config["vocab_size"],)


def test_the_graph_equals_the_numpy_decoder(trained: tuple[Path, dict[str, Any]]) -> None:
    """Master weights in the training graph, and the folder read and ternarised by the loader: the same loss."""
    out, _ = trained
    ids = np.random.default_rng(0).integers(0, 300, 70).astype(np.uint16)
    want = total_nats(NumpyDecoder(read_weights(out)), ids, 32, 16)
    got = evaluate.total_nats(evaluate.master_model(out, 32), ids, 32, 16, batch=2)
    assert got == pytest.approx(want, rel=2e-3)  # a code flips now and then


def test_packed_is_the_same_model_with_an_eight_bit_head(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, _ = trained
    size = pack(out, tmp_path / "packed")
    assert size == sum(p.stat().st_size for p in (tmp_path / "packed").iterdir())
    plain, packed = read_weights(out, head_bits=8), read_weights(tmp_path / "packed")
    assert packed.linears.keys() == plain.linears.keys()
    for name, linear in packed.linears.items():
        np.testing.assert_array_equal(linear.weight.words, plain.linears[name].weight.words)  # type: ignore[union-attr]
    ids = np.random.default_rng(1).integers(0, 300, 40).astype(np.uint16)
    want = total_nats(NumpyDecoder(packed), ids, 32, 16)
    got = evaluate.total_nats(evaluate.packed_model(tmp_path / "packed"), ids, 32, 16)
    assert got == pytest.approx(want, rel=2e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resume_goes_on_to_the_last_bit(data: Path, tmp_path: Path, dtype: str) -> None:
    whole = options(data, tmp_path / "whole", dtype=dtype, save_every=5)
    train(whole, silent)
    parts = replace(whole, output=tmp_path / "parts", max_seconds=0.0)
    for number in range(1, 4):  # each stops after one more step
        record = train(parts, silent)
        assert record["steps"] == number and not record["finished"]
        parts = replace(parts, resume=True)
    train(replace(parts, max_seconds=None), silent)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    first, second = (mx.load(str(tmp_path / run / "model.safetensors")) for run in ("whole", "parts"))
    for name, weight in first.items():  # type: ignore[union-attr]
        assert mx.array_equal(weight, second[name]), name  # type: ignore[index]
    done = train(replace(parts, max_seconds=None), silent)
    assert done["finished"] and done["loss"] is None


def test_resume_refuses_what_would_change_its_course(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(options(data, out, iters=2), silent)
    with pytest.raises(ConfigError, match=r"give --resume to go on"):
        train(options(data, out, iters=2), silent)
    with pytest.raises(ConfigError, match=r"learning_rate is 0.1, but .* was written with 0.003"):
        train(options(data, out, iters=2, resume=True, learning_rate=0.1), silent)
    with pytest.raises(ConfigError, match="data is "):
        train(options(write_texts(tmp_path / "other", seed=1), out, iters=2, resume=True), silent)
    with pytest.raises(FormatError, match=r"this model needs \(320, 32\)"):
        train(options(data, out, iters=2, resume=True, hidden_size=32), silent)
    with pytest.raises(ConfigError, match="num_attention_heads is 2, but .* was written with 4"):  # of the same shapes
        train(options(data, out, iters=2, resume=True, num_heads=2, num_kv_heads=1), silent)
    state = out / "checkpoints" / "step-00000002" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(FormatError, match="damaged"):
        train(options(data, out, iters=2, resume=True), silent)


def test_a_refused_run_leaves_everything_as_it_was(data: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out", write_texts(tmp_path / "other", seed=1)
    train(options(data, out, iters=2), silent)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for changes in ({}, {"seq_length": 99_999, "resume": True}, {"learning_rate": 0.1, "resume": True}):
        with pytest.raises(ConfigError):
            train(options(other, out, iters=2, **changes), silent)
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    with pytest.raises(ConfigError, match="fewer than one sequence"):
        train(options(data, tmp_path / "new", seq_length=99_999), silent)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("changes", [{"grad_checkpoint": True}, {"grad_accumulation_steps": 2, "batch_size": 1}])
def test_less_memory_is_the_same_training(
    trained: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Layers computed twice: the same bits. Two batches of one: the same but for the order of a sum."""
    out, _ = trained
    runs = [
        options(data, tmp_path / name, iters=3, model=out, warmup=0, **more)
        for name, more in (("plain", {}), ("less", changes))
    ]
    found = [losses(run.output) for run in runs if train(run, silent)]
    if "grad_checkpoint" in changes:
        assert found[0] == found[1]
    np.testing.assert_allclose(found[1][:1], found[0][:1], rtol=1e-5)


def test_the_picture_of_a_run(data: Path, tmp_path: Path) -> None:
    train(options(data, tmp_path / "out", iters=3, plot=tmp_path / "loss.html"), silent)
    assert "bitnet-mlx train: out on cpu" in (tmp_path / "loss.html").read_text()
    with pytest.raises(ConfigError, match=r"\.png or \.html"):
        options(data, tmp_path / "out", plot=tmp_path / "loss.pdf")


def test_a_checkpoint_that_was_cut_off_is_not_seen(tmp_path: Path) -> None:
    state = {part: {"w": mx.ones((2, 2)) * i} for i, part in enumerate(("parameters", "m", "v"))}
    checkpoint.save(tmp_path, 7, state, {})
    (tmp_path / ".step-00000009.writing").mkdir()
    (tmp_path / "step-00000008").mkdir()
    newest = checkpoint.latest(tmp_path)
    assert newest is not None and newest.name == "step-00000007"
    facts, loaded = checkpoint.load(newest, state, {})
    with pytest.raises(ConfigError, match="teacher is 'a model', but .* was written with None"):
        checkpoint.load(newest, state, {"teacher": "a model"})
    assert facts["step"] == 7 and [float(part["w"].sum()) for part in loaded.values()] == [0.0, 4.0, 8.0]


def test_training_starts_from_a_model(trained: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path) -> None:
    out, record = trained
    train(options(data, tmp_path / "more", iters=2, model=out, learning_rate=1e-5), silent)
    assert log(tmp_path / "more")[0]["loss"] < record["loss"] * 1.3
    config, _ = read_master(tmp_path / "more", 64)
    assert config.max_position_embeddings == 64


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(bad: str, data: Path, tmp_path: Path) -> None:
    """Nor does any after it, so that the state is that before the failing step whenever it is looked at."""
    update = Update(Task(options(data, tmp_path), None, dict, lambda _: Part((), 1.0, 1)), Group())
    state, rates = optimizer.init("adamw", {"w": mx.ones((2, 2))}), optimizer.rates(0, 0.1, 0.0)
    counts = {"weight": mx.array(1.0), "tokens": mx.array(1.0)}

    def step(loss: float, gradient: float, alive: bool) -> tuple[State, bool]:
        total = {"gradients": {"w": mx.full((2, 2), gradient)}, "losses": {"loss": mx.array(loss)}, "counts": counts}
        update.total = lambda _parameters, _step: total  # type: ignore[method-assign]
        new, lives, _ = update(state, mx.array(alive), 0, rates)
        return new, bool(lives)

    good, lives = step(1.0, 0.5, True)
    assert lives and not mx.array_equal(good["parameters"]["w"], state["parameters"]["w"])
    for loss, gradient, alive in (
        (float("nan"), 0.5, True) if bad == "loss" else (1.0, float("inf"), True),
        (1.0, 0.5, False),
    ):
        same, lives = step(loss, gradient, alive)
        assert not lives and all(mx.array_equal(same[part]["w"], state[part]["w"]) for part in state)


def test_speed_is_of_the_time_since_the_last_look(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((0.0, 2.0, 5.0, 9.0))
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=clock.__next__))
    meter = Meter(Place(0, {}))
    values = {"loss": mx.array(1.0), "grad_norm": mx.array(1.0), "tokens": mx.array(60.0)}
    meter.add(values, {"step": 1})
    [first], _ = meter.read()
    meter.restart()  # a checkpoint was written until 5
    for step in (2, 3):
        meter.add(values, {"step": step})
    entries, _ = meter.read()
    assert first["tokens_per_second"] == 30 and [e["tokens_per_second"] for e in entries] == [30, 30]
    assert [e["trained_tokens"] for e in (first, *entries)] == [60, 120, 180] and entries[-1]["seconds"] == 9


def test_a_loss_that_is_no_number_stops_the_run(data: Path, tmp_path: Path) -> None:
    """The host looks at seven steps at once; those before the failing one are in the log all the same."""
    with pytest.raises(TrainError, match=r"step [1-9]\d*: loss .*(nan|inf).*, first in the ") as caught:
        train(options(data, tmp_path / "out", iters=40, learning_rate=1e20, steps_per_report=7), silent)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    steps = [step for step, _, _ in losses(tmp_path / "out")]
    assert steps == list(range(1, len(steps) + 1)) and f"step {len(steps) + 1}:" in str(caught.value)


def test_the_float_twin_is_described_as_float(data: Path, tmp_path: Path) -> None:
    train(options(data, tmp_path / "out", iters=2, quantise=False), silent)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    ids = np.arange(30, dtype=np.uint16) + 40
    want = total_nats(NumpyDecoder(read_weights(tmp_path / "out")), ids, 32, 16)
    assert evaluate.total_nats(evaluate.master_model(tmp_path / "out", 32), ids, 32, 16) == pytest.approx(
        want, rel=1e-5
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"iters": 0},
        {"seq_length": 100_000},
        {"num_heads": 3},
        {"learning_rate": float("nan")},
        {"vocab_size": 10},
        {"dtype": "float16"},
        {"quantise": False, "ste": "soft"},
        {"optimizer": "sgd"},
        {"grad_accumulation_steps": 0},
        {"plot": Path("nowhere/loss.png")},
    ],
)
def test_settings_out_of_range(data: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(BitnetError, match=r"^\[train\]"):
        train(options(data, tmp_path / "out", **changes), silent)
