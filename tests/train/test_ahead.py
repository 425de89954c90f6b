"""Kernels compiled ahead: they are those that a step needs, and a reader never finds half of one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bitnet_mlx.train import ahead

# MLX names a fused kernel by its operations, alike on every device; on a CPU each is a library on disk. As on a GPU everything
# is compiled here, and MLX's fast operations, which a CPU would fuse with what is around them, are products instead.
HEAD = """
import sys
import mlx.core as mx
import bitnet_mlx.train.evaluate as evaluate

evaluate.compiled = lambda function, inputs=None: mx.compile(function, inputs=inputs)
same = lambda x, *_, **__: x @ mx.eye(x.shape[-1], dtype=x.dtype)
mx.fast.rope = same
mx.fast.rms_norm = lambda x, weight, eps: same(x) @ (weight[:, None] @ weight[None])
mx.fast.cross_entropy = lambda x, targets: (x @ mx.ones((x.shape[-1], 1))).reshape(targets.shape)
mx.fast.scaled_dot_product_attention = lambda q, k, v, **_: (q @ k.swapaxes(-1, -2)) @ v
job = sys.argv[1]
"""
JOB = """
import inspect
from bitnet_mlx.train import ahead
told = {"dtype": "float32", "optimizer": "adamw", "act": "silu", "temperature": 1.0 if sys.argv[3] else None}
ahead._WORK[job](**{name: told[name] for name in inspect.signature(ahead._WORK[job]).parameters})
"""
TRAIN = """
import numpy as np
from pathlib import Path
from bitnet_mlx.train import loop, optimizer
from bitnet_mlx.train.data import Windows
from bitnet_mlx.train.group import Group
from bitnet_mlx.train.options import TrainOptions
from bitnet_mlx.train.prepare import Dataset
from bitnet_mlx.train.update import Update

options = TrainOptions(data=(), output=Path("."), dtype="float32", vocab_size=32, hidden_size=8, intermediate_size=16,
    num_layers=2, num_heads=2, num_kv_heads=2, seq_length=4, batch_size=2)
ids = np.arange(64, dtype=np.int32) % 32
dataset = Dataset(ids, None, 0, {str(i): i for i in range(32)}, {}, lambda _: None)
model, parameters = loop.initial_model(options, dataset)
task = loop.make_task(options, dataset, Windows(len(ids), 4, 2, 0), model)
"""
QAT = """
import numpy as np
from pathlib import Path
from bitnet_mlx.checkpoint.read import read_weights
from bitnet_mlx.train import optimizer, qat
from bitnet_mlx.train.group import Group
from bitnet_mlx.train.masters import make_student, trained
from bitnet_mlx.train.qat_options import QatOptions
from bitnet_mlx.train.qat_run import Run
from bitnet_mlx.models.decoder_mlx import MlxModel
from bitnet_mlx.train.teacher import Teacher, narrowed
from bitnet_mlx.train.update import Update

folder = Path(sys.argv[2])
options = QatOptions(model=str(folder), data=(), output=folder, batch_size=2, seq_length=4, kl_weight=0.5 if sys.argv[3] else 0.0)
weights = read_weights(folder)
student = make_student(weights, "float32")
teacher = Teacher(lambda: narrowed(MlxModel(weights, "float32")), options, ([], None), None)
task = qat.make_job(Run(options, folder, weights, student, teacher, np.arange(64, dtype=np.int32) % 32, []), Group(), True).task
parameters = trained(student)
"""
STEP = """
task.model.train()
update, state = Update(task, Group()), optimizer.init("adamw", parameters)
mx.eval(state)
mx.eval(update(state, mx.array(True), 0, optimizer.rates(0, 1e-4, 0.1)))
"""


def kernels(folder: Path, script: str, *arguments: str) -> set[str]:
    """The names of the kernels that MLX's CPU device compiles in a script."""
    folder.mkdir()
    environment = {**os.environ, "TMPDIR": str(folder)}
    subprocess.run([sys.executable, "-c", HEAD + script, *arguments], env=environment, check=True, timeout=200)
    names = (path.stem for path in folder.rglob("*.so"))
    return {re.sub(r"_(contiguous|strided_\d+)$", "", name) for name in names}


@pytest.mark.skipif(shutil.which("g++") is None, reason="MLX's CPU device compiles with g++")
@pytest.mark.parametrize(("command", "taught"), [("train", ""), ("qat", ""), ("qat", "taught")])
def test_what_is_compiled_ahead_is_what_a_step_needs(command: str, taught: str, tmp_path: Path) -> None:
    from tests.support import hf_folder

    hf_folder.write(tmp_path / "model", "llama", "dense", num_key_value_heads=4, num_attention_heads=4)
    step = kernels(
        tmp_path / "step", (TRAIN if command == "train" else QAT) + STEP, "", str(tmp_path / "model"), taught
    )
    for job in ahead.JOBS[command]:
        made = kernels(tmp_path / job, JOB, job, "", taught)
        assert made and made <= step, f"{job}: {made - step}"


def test_a_kernel_is_whole_when_it_can_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX looks for NAME.ptx, in folders where the name is long, and then reads NAME.txt."""
    own, shared = tmp_path / "own", tmp_path / "shared"
    for name in ("b", "long/name"):
        for kind in ("ptx", "txt", "cu"):
            path = own / f"{name}.{kind}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name + kind)
    replace = os.replace

    def watched(old: Path, new: Path) -> None:
        assert new.suffix != ".ptx" or new.with_suffix(".txt").read_text() == old.read_text()[:-3] + "txt"
        replace(old, new)

    monkeypatch.setattr(os, "replace", watched)
    ahead.publish(own, shared)
    found = {str(path.relative_to(shared)) for path in shared.rglob("*") if path.is_file()}
    assert found == {f"{name}.{kind}" for name in ("b", "long/name") for kind in ("ptx", "txt", "cu")}


def test_a_process_hands_over_and_leaves_a_mark(tmp_path: Path) -> None:
    """The second time there is nothing to start. MLX's CPU device writes no kernel where CUDA's goes."""
    facts = {"optimizer": "lion"}
    environment = {**os.environ, ahead.CACHE: str(tmp_path / "mlx" / "ptx")}
    command = [sys.executable, "-m", "bitnet_mlx.train.ahead", "update", json.dumps(facts)]
    subprocess.run(command, env=environment, check=True, timeout=100)
    [mark] = (tmp_path / "mlx" / "ptx").iterdir()
    assert mark.name.startswith("bitnet_mlx-") and [path.name for path in (tmp_path / "mlx").iterdir()] == ["ptx"]


def test_without_cuda_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    ahead.start("train", "float32", "adamw", "relu2")
