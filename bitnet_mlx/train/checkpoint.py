"""Checkpoints of a training run: whole or not there at all.

    OUTPUT/checkpoints/step-00001000/state.safetensors   parameters and both moments, float32, each under its part's prefix
    OUTPUT/checkpoints/step-00001000/trainer.json        steps done, position in the data, seed, settings

A folder is written under another name, flushed to the disk and renamed. No random state is kept beyond the seed: the
order of the data is a function of seed and step (train/data.py), and nothing else in training is random.
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
from bitnet_mlx.train.optimizer import Tensors

PARTS = ("parameters", "first", "second")
_NAME = re.compile(r"step-(\d{8})")
KEPT = 2


def flush(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(folder: Path, step: int, state: tuple[Tensors, Tensors, Tensors], facts: dict[str, Any]) -> Path:
    """Write a checkpoint after `step` steps and drop all but the last two."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    scratch = folder / f".{final.name}.writing"
    for stale in (scratch, final):
        shutil.rmtree(stale, ignore_errors=True)
    scratch.mkdir()
    tensors = {f"{part}.{name}": t for part, named in zip(PARTS, state, strict=True) for name, t in named.items()}
    mx.save_safetensors(str(scratch / "state.safetensors"), tensors)
    (scratch / "trainer.json").write_text(json.dumps({"step": step, **facts}, indent=2) + "\n", "utf-8")
    for path in (*scratch.iterdir(), scratch):
        flush(path)
    scratch.rename(final)
    flush(folder)
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


def load(path: Path, expected: Tensors, settings: dict[str, Any]) -> tuple[int, tuple[Tensors, Tensors, Tensors]]:
    """Read a checkpoint: steps done, and (parameters, first, second).

    Raises FormatError where it is damaged or of another model, ConfigError where a setting that decides the course of
    training differs from the one it was written under.
    """
    try:
        facts = json.loads((path / "trainer.json").read_text("utf-8"))
        step = int(facts["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"[train --resume] {path}/trainer.json is damaged: {error!r}; remove {path}") from error
    for key, value in settings.items():
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
    state = []
    for part in PARTS:
        named = {name: tensors.get(f"{part}.{name}") for name in expected}
        for name, tensor in named.items():
            if tensor is None or tensor.shape != expected[name].shape:
                shape = None if tensor is None else tensor.shape
                raise FormatError(
                    f"[train --resume] {path} holds {part}.{name} as {shape}; this model needs {expected[name].shape}"
                )
        state.append(named)
    return step, (state[0], state[1], state[2])
