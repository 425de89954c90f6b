"""Runs of train, qat and lora small enough for a test, and processes that take them and end in the middle.

python -m tests.train.tiny_runs killed FOLDER     each run in a child that ends at some step; prints how each ended
python -m tests.train.tiny_runs one FOLDER NAME   one of these runs, in this process
python -m tests.train.tiny_runs ranks FOLDER HOW  runs as one rank of a ring; rank 1 ends, or stops, in the last
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bitnet_mlx.errors import TrainError
from bitnet_mlx.models.decoder_mlx import MlxModel
from bitnet_mlx.tokenizer import load_tokenizer
from bitnet_mlx.train import checkpoint, pieces
from bitnet_mlx.train import run as loop
from bitnet_mlx.train.group import join
from bitnet_mlx.train.loop import train
from bitnet_mlx.train.lora import lora
from bitnet_mlx.train.lora_options import LoraOptions
from bitnet_mlx.train.options import TrainOptions
from bitnet_mlx.train.qat import qat
from bitnet_mlx.train.qat_options import QatOptions
from tests.support import hf_folder, tiny_tokenizers
from tests.support.random_model import random_weights, tiny_config

COMMANDS = ("train", "qat", "lora")
WROTE = {"train": "model.safetensors", "qat": "model.safetensors", "lora": "adapters.safetensors"}
Report = Callable[[dict[str, Any]], None]
TEXT = "hello world the quick brown fox jumps over a lazy dog\n"


def prepare(folder: Path) -> None:
    """A float model with its tokenizer, a text and samples."""
    hf_folder.write(folder / "float", "llama", "dense", vocab_size=420, num_hidden_layers=1)
    tiny_tokenizers.byte_level(folder / "float")
    (folder / "data").mkdir()
    (folder / "data" / "text.txt").write_text(TEXT * 20)
    samples = [json.dumps({"text": " ".join(TEXT.split()[: 2 + i])}) for i in range(7)]
    (folder / "data" / "train.jsonl").write_text("\n".join(samples))


@contextmanager
def _small_pieces() -> Iterator[None]:
    """Inside, the losses of a batch are computed in several pieces."""
    before, pieces.BYTES = pieces.BYTES, 8 << 10
    try:
        yield
    finally:
        pieces.BYTES = before


@_small_pieces()
def go(command: str, folder: Path, name: str, report: Report, **changes: Any) -> Path:
    """Take a run, or what is left of it, and return its folder."""
    data, output = folder / "data" / "text.txt", folder / name
    base: dict[str, Any] = dict(iters=5, warmup=1, save_every=2, steps_per_report=1, learning_rate=1e-3, batch_size=2)
    base.update(changes)
    if command == "train":
        shape = dict(hidden_size=32, intermediate_size=48, num_layers=1, num_heads=2, vocab_size=290, dtype="float32")
        train(TrainOptions(data=(data,), output=output, seq_length=12, weight_decay=0.1, **shape, **base), report)  # type: ignore[arg-type]
    elif command == "qat":
        qat(QatOptions(model=str(folder / "float"), data=(data,), output=output, seq_length=12, **base), report)
    else:
        model = MlxModel(random_weights(tiny_config(vocab_size=420, num_hidden_layers=1), seed=3))
        options = LoraOptions(data=data.parent, adapter_path=output, train=True, rank=2, dropout=0.1, pack=True, **base)
        lora(options, model, load_tokenizer(folder / "float"), report)
    return output


def log(output: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of each record."""
    entries = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in entries]


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _end_at(step: int) -> Report:
    return lambda entry: _die() if entry["step"] == step else None


def _end_while_saving(entry: dict[str, Any]) -> None:
    """Between the writing of a checkpoint's files and its name."""
    if entry["step"] == 4:
        checkpoint.flush = lambda path: _die()


def _limit_files(size: int) -> Report:
    """From step 3 on no file may grow over `size` bytes: what a full disk does, at a known moment."""

    def limit(entry: dict[str, Any]) -> None:
        if entry["step"] == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


ENDS: dict[str, Report] = {"adamw": _end_at(3), "muon": _end_while_saving, "lion": _end_at(1)}


FULL = {"full": 10_000, "full-log": 300}  # bytes of a file


def one(folder: Path, name: str) -> str:
    """Take the run of that name: a command with an optimiser, or one on a disk that fills. The error's text, if it ends so."""
    command, _, optimizer = name.partition("-")
    try:
        if name in FULL:
            go("train", folder, name, _limit_files(FULL[name]))
        else:
            go(command, folder, name, ENDS[optimizer], optimizer=optimizer, grad_accumulation_steps=2)
    except TrainError as error:
        return str(error)
    return ""


def _in_a_child(folder: Path, name: str) -> str:
    """How it ended: "signal 9", or the error's text. A fork spares the child the imports: MLX has no threads before its
    first operation. Metal, through which MLX allocates on a Mac, does not live through one: there a new process starts.
    """
    if sys.platform == "darwin":
        command = [sys.executable, "-m", "tests.train.tiny_runs", "one", str(folder), name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        return f"signal {-done.returncode}" if done.returncode < 0 else json.loads(done.stdout.splitlines()[-1])
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.write(write, one(folder, name).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else text


def killed(folder: Path) -> dict[str, str]:
    """Every command with every optimiser, and one on a disk that fills."""
    names = [*(f"{command}-{optimizer}" for command in COMMANDS for optimizer in ENDS), *FULL]
    return {name: _in_a_child(folder, name) for name in names}


def ranks(folder: Path, how: str) -> dict[str, str]:
    """As one rank: every command, each with another optimiser; then a run in which rank 1 ends or stops."""
    rank = join(120.0).rank
    for command, optimizer in zip(COMMANDS, ENDS, strict=True):
        if how == "SIGKILL":
            go(command, folder, f"ring-{command}-{rank}", lambda entry: None, optimizer=optimizer)

    def lose(step: int) -> None:
        if rank == 1 and step == 3:
            os.kill(os.getpid(), getattr(signal, how))

    rate = loop.learning_rate  # asked at each step, on every rank
    loop.learning_rate = lambda step, *rest: (lose(step), rate(step, *rest))[1]
    try:
        go("train", folder, f"lost-{how}-{rank}", lambda entry: None, rank_timeout=5.0)
    except TrainError as error:
        return {"lost": str(error)}
    return {}


if __name__ == "__main__":
    what, place, *more = sys.argv[1:]
    if what == "alone":
        join(2.0)
    else:
        print(json.dumps({"killed": killed, "one": one, "ranks": ranks}[what](Path(place), *more)))
