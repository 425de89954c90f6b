"""From float to ternary: torch's numbers, the schedules, the written model, and runs that are killed."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from bitnet_mlx.checkpoint.read import read_weights
from bitnet_mlx.cli.main import main
from bitnet_mlx.errors import ConfigError
from bitnet_mlx.formats.dense import DenseRows
from bitnet_mlx.models.decoder_mlx import MlxModel
from bitnet_mlx.nn.dense import DenseLinear
from bitnet_mlx.tokenizer import load_tokenizer
from bitnet_mlx.train.blend import SCHEDULES, blends
from bitnet_mlx.train.losses import distance
from bitnet_mlx.train.masters import MasterLinear, make_student, set_blend, trained
from bitnet_mlx.train.qat import qat
from bitnet_mlx.train.qat_options import QatOptions
from bitnet_mlx.train.qat_run import prepare
from tests.support import hf_folder
from tests.support.random_model import random_weights, tiny_config
from tests.train.support import SMALL, silent
from tests.train.support import qat_options as options

GOLDEN = np.load(Path(__file__).parent / "data" / "qat_torch.npz")
LINEARS = tuple(tiny_config().linear_shapes())


@pytest.mark.parametrize("blend", [0.0, 0.3, 1.0])
def test_outputs_and_gradients_are_torchs(blend: float) -> None:
    layer = MasterLinear(DenseLinear(DenseRows(GOLDEN["w"], "float32"), GOLDEN["bias"]))
    layer.blend = blend

    def loss(x: mx.array, w: mx.array) -> mx.array:
        layer.weight = w
        return (mx.sin(layer(x)) * mx.array(GOLDEN["c"])).sum()

    x, w = mx.array(GOLDEN["x"]), mx.array(GOLDEN["w"])
    dx, dw = mx.grad(loss, argnums=(0, 1))(x, w)
    layer.weight = w
    for name, found in (("y", layer(x)), ("dx", dx), ("dw", dw)):
        np.testing.assert_allclose(np.array(found), GOLDEN[f"{blend}.{name}"], rtol=1e-4, atol=2e-5)


def test_the_teachers_distance_is_torchs() -> None:
    p, q = mx.array(GOLDEN["p"]) * 3, mx.array(GOLDEN["q"]) * 3
    kl, dq = mx.value_and_grad(lambda q: distance(p, q, 1.7).mean())(q)
    assert kl.item() == pytest.approx(float(GOLDEN["kl"]), rel=1e-5)
    np.testing.assert_allclose(np.array(dq), GOLDEN["kl.dq"], rtol=1e-4, atol=1e-6)
    assert distance(q, q, 2.0).mean().item() == pytest.approx(0, abs=1e-6)


def test_an_input_is_quantised_once_for_the_linears_that_share_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf_folder.write(tmp_path, "llama", "dense")
    student, calls, prepare = make_student(read_weights(tmp_path)), [], MasterLinear.prepare
    set_blend(student.layers, [1.0, 1.0])
    monkeypatch.setattr(MasterLinear, "prepare", lambda self, x: calls.append(x.shape) or prepare(self, x))
    student(mx.array([[3, 1, 4]]))
    assert calls == 2 * [(1, 3, 72), (1, 3, 72), (1, 3, 72), (1, 3, 100)]  # q, k and v; o; gate and up; down


def test_schedules() -> None:
    assert blends("constant", 0, 10, 2) == [1, 1]
    assert blends("linear", 5, 10, 2) == [0.5, 0.5]
    assert blends("exponential", 5, 10, 1)[0] == pytest.approx(1 - 1e-3**0.5)
    assert blends("layers", 5, 10, 4) == [1, 1, 0, 0] and blends("layers", 6, 10, 4) == pytest.approx([1, 1, 0.4, 0])
    for schedule in SCHEDULES:
        rows = [blends(schedule, step, 10, 3) for step in range(12)]
        assert rows[10] == rows[11] == [1, 1, 1] and blends(schedule, 0, 0, 3) == [1, 1, 1]
        assert all(a <= b for before, after in pairwise(rows) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("family", ["llama", "bitnet", "qwen3"])
def test_blend_0_is_the_float_model_and_1_the_ternary_one(family: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"llama": {"attention_bias": True}, "qwen3": {"head_dim": 18}}.get(family, {})
    for name, storage in (("float", "dense"), ("ternary", "online")):
        hf_folder.write(tmp_path / name, family, storage, seed=2, **changes)
    weights, ids = read_weights(tmp_path / "float"), mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])
    student = make_student(weights)
    assert len(trained(student)) == 2 * (7 + len(weights.config.norm_sizes())) + 1
    for blend, parent in ((0.0, weights), (1.0, read_weights(tmp_path / "ternary"))):
        set_blend(student.layers, [blend, blend])
        expected, found = np.array(MlxModel(parent)(ids)), np.array(student(ids))
        off = np.abs(found - expected).max(axis=-1) / expected.std()
        assert np.median(off) < 1e-4 and off.max() < 0.5  # an int8 code may flip at a position


def test_from_float_to_ternary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = qat(options(tmp_path, "out", iters=40, blend="layers", blend_fraction=0.2, kl_weight=1.0), silent)
    assert record["parent"]["kl"] == pytest.approx(0, abs=1e-4)
    assert record["after"]["kl"] < record["before"]["kl"]
    assert record["after"]["perplexity"] < record["before"]["perplexity"]
    flags = ["--model", tmp_path / "out", "--teacher", tmp_path / "float", "--data", tmp_path / "eval.txt"]
    words = ["evaluate", *map(str, flags), "--length", "16", "--stride", "8", "--backend", "numpy", "--json"]
    assert main(words) == 0
    read = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert read["nats_per_token"] == pytest.approx(record["after"]["nats_per_token"], rel=2e-2)
    weights = read_weights(tmp_path / "out")
    assert np.array_equal(
        weights.embed_tokens.rows(slice(None)), read_weights(tmp_path / "float").embed_tokens.rows(slice(None))
    )


def test_a_text_ends_where_its_document_does(tmp_path: Path) -> None:
    run = prepare(options(tmp_path, "out"))
    tokenizer = load_tokenizer(tmp_path / "float")
    text = tokenizer.encode((tmp_path / "train.txt").read_text())
    assert run.ids.tolist() == [*text, tokenizer.eos_token_id]


def command(flags: QatOptions, *more: str) -> list[str]:
    given = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items() if k != "iters"]
    paths = ["--model", flags.model, "--data", str(flags.data[0]), "--output", str(flags.output)]
    return [sys.executable, "-W", "error", "-m", "bitnet_mlx", "qat", *paths, *given, *more]


def test_killed_and_resumed_is_the_same_to_the_bit(tmp_path: Path) -> None:
    whole, part = options(tmp_path, "whole", iters=16, eval_data=()), options(tmp_path, "part", iters=16, eval_data=())
    qat(whole, silent)
    with subprocess.Popen(command(part, "--iters=16"), stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while not (part.output / "checkpoints" / "step-00000004").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    done = subprocess.run(command(part, "--iters=16", "--resume"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr

    def trace(run: QatOptions) -> dict[int, float]:
        entries = [json.loads(line) for line in (run.output / "log.jsonl").read_text().splitlines()]
        return {entry["step"]: entry["loss"] for entry in entries}

    assert trace(part) == trace(whole) and len(trace(whole)) == 16
    assert (part.output / "model.safetensors").read_bytes() == (whole.output / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="earlier run; give --resume"):
        qat(part, silent)
    with pytest.raises(ConfigError, match="blend is 'constant'"):
        qat(options(tmp_path, "part", iters=16, eval_data=(), blend="constant", resume=True), silent)


def test_layers_computed_twice_give_the_same_bits(tmp_path: Path) -> None:
    found = []
    for twice in (False, True):
        more: dict[str, Any] = dict(eval_data=(), hidden_weight=1.0, attention_weight=1.0, optimizer="muon")
        record = qat(options(tmp_path, f"out{twice}", iters=3, grad_checkpoint=twice, **more), silent)
        found.append((record["first_loss"], record["loss"]))
    assert found[0] == found[1]


def test_bfloat16_computes_over_float32_masters(tmp_path: Path) -> None:
    """The loss is near to float32's and not its, and the masters are no bfloat16 numbers."""
    found = []
    for dtype in ("float32", "bfloat16"):
        flags = options(tmp_path, dtype, iters=2, eval_data=(), dtype=dtype, blend="constant")
        found.append(qat(flags, silent)["first_loss"])
    assert found[0] != found[1] == pytest.approx(found[0], rel=2e-2)
    written = mx.load(str(tmp_path / "bfloat16" / "model.safetensors"))
    masters = written["model.layers.0.mlp.up_proj.weight"]  # type: ignore[index,call-overload]
    assert masters.dtype == mx.float32 and not mx.array_equal(masters, masters.astype(mx.bfloat16).astype(mx.float32))
    with pytest.raises(ConfigError, match="dtype is 'float32', but"):
        qat(
            options(tmp_path, "bfloat16", iters=2, eval_data=(), dtype="float32", blend="constant", resume=True), silent
        )


def test_a_float32_parent_and_its_student_compute_in_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    """So nothing lies between them before the blend begins; and the head that is written is the parent's."""
    run = options(tmp_path, "out", iters=1, eval_data=(), dtype="bfloat16", blend_fraction=1.0)
    hf_folder.write(tmp_path / "float", "llama", "dense", vocab_size=420, dtype=mx.float32)
    student = make_student(read_weights(tmp_path / "float"), "bfloat16")
    assert student.project(mx.zeros((1, 72), mx.bfloat16)).dtype == student.lm_head.weight.dtype == mx.bfloat16
    qat(run, silent)
    assert json.loads((run.output / "log.jsonl").read_text())["kl"] == pytest.approx(0, abs=1e-6)
    heads = [
        mx.load(str(folder / "model.safetensors"))["lm_head.weight"] for folder in (run.output, tmp_path / "float")
    ]  # type: ignore[index,call-overload]
    assert heads[0].dtype == mx.float32 and mx.array_equal(*heads)


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ternary or quantised already"):
        make_student(random_weights(tiny_config()))
    with pytest.raises(ConfigError, match="norm of its own"):
        make_student(random_weights(tiny_config(), dense=LINEARS, normed=LINEARS[:1]))
    with pytest.raises(ConfigError, match="the model's context holds"):
        qat(options(tmp_path, "out", seq_length=99999), silent)
    hf_folder.write(tmp_path / "other", "llama", "dense", vocab_size=400)
    with pytest.raises(ConfigError, match="knows 400 tokens, the model 420"):
        qat(options(tmp_path, "out", teacher=str(tmp_path / "other")), silent)
    shutil.copytree(tmp_path / "float", tmp_path / "renamed")
    table = json.loads((tmp_path / "renamed" / "tokenizer.json").read_text())
    vocab = table["model"]["vocab"]
    one, two = load_tokenizer(tmp_path / "float").encode("hello world", add_special_tokens=False)[:2]
    names = {i: name for name, i in vocab.items()}
    vocab[names[one]], vocab[names[two]] = two, one
    (tmp_path / "renamed" / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(ConfigError, match=r"token \d+ is .* to the model and .* to the teacher"):
        qat(options(tmp_path, "out", teacher=str(tmp_path / "renamed")), silent)
    for change, message in (
        ({"iters": 0}, "--iters is 0"),
        ({"kl_weight": 2}, "0 to 1"),
        ({"blend": "slow"}, "'slow'"),
    ):
        with pytest.raises(ConfigError, match=message):
            options(tmp_path, "out", **change)
    assert not (tmp_path / "out" / "model.safetensors").exists()
