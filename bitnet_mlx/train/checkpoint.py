"""Checkpoints of a training run: whole or not there at all.

    OUTPUT/checkpoints/step-00001000/state.safetensors   parameters and the optimiser's arrays, float32, "PART.NAME"
    OUTPUT/checkpoints/step-00001000/trainer.json        steps done, position in the data, random state, settings

A folder is written under another name, flushed to the disk and renamed. The random state is the seed and the number of the
next batch: the order of the data (train/data.py, train/batches.py) and dropout are functions of the two.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx

from bitnet_mlx.errors import ConfigError, FormatError
from bitnet_mlx.train.disk import writing
from bitnet_mlx.train.optimizer import State

_NAME = re.compile(r"step-(\d{8})")
KEPT = 2


def flush(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(folder: Path, step: int, state: State, facts: dict[str, Any]) -> Path:
    """Write a checkpoint after `step` steps and drop all but the last two. Raises TrainError where it cannot be written,
    as on a full disk; those before it stay."""
    final = folder / f"step-{step:08d}"
    scratch = folder / f".{final.name}.writing"
    tensors = {f"{part}.{name}": t for part, named in state.items() for name, t in named.items()}
    with writing(final):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            mx.save_safetensors(str(scratch / "state.safetensors"), tensors)
            (scratch / "trainer.json").write_text(json.dumps({"step": step, **facts}, indent=2) + "\n", "utf-8")
            for path in (*scratch.iterdir(), scratch):
                flush(path)
            shutil.rmtree(final, ignore_errors=True)
            scratch.rename(final)
            flush(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    for old in _found(folder)[:-KEPT]:
        shutil.rmtree(old)
    return final


def _found(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if _NAME.fullmatch(p.name) and (p / "trainer.json").is_file())


def latest(folder: Path) -> Path | None:
    """The checkpoint with the most steps, or None."""
    found = _found(folder)
    return found[-1] if found else None


def load(path: Path, expected: State, settings: dict[str, Any]) -> tuple[dict[str, Any], State]:
    """Read a checkpoint: its facts, "step" among them, and a state of the same names and shapes as `expected`.

    Raises FormatError where it is damaged or of another model, ConfigError where a setting that decides the course of
    training differs from the one it was written under.
    """
    try:
        facts = json.loads((path / "trainer.json").read_text("utf-8"))
        int(facts["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"[train --resume] {path}/trainer.json is damaged: {error!r}; remove {path}") from error
    for key, value in json.loads(json.dumps(settings)).items():
        if facts.get(key) != value:
            raise ConfigError(
                f"[train --resume] {key} is {value!r}, but {path} was written with {facts.get(key)!r}; "
                "give the same value, or start anew in another --output"
            )
    try:
        tensors = mx.load(str(path / "state.safetensors"))
    except RuntimeError as error:
        raise FormatError(f"[train --resume] {path}/state.safetensors is damaged: {error}; remove {path}") from error
    assert isinstance(tensors, dict)
    state: State = {}
    for part, named in expected.items():
        for name, like in named.items():
            tensor = tensors.get(f"{part}.{name}")
            if tensor is None or tensor.shape != like.shape:
                shape = None if tensor is None else tensor.shape
                raise FormatError(
                    f"[train --resume] {path} holds {part}.{name} as {shape}; this model needs {like.shape}"
                )
            state.setdefault(part, {})[name] = tensor
    return facts, state
