"""The committed goldens: one compressed npz for each case, and a manifest with the checkpoints' sha256."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

DATA = Path(__file__).parent / "data"


@dataclass
class Golden:
    """What transformers computed for one case of L tokens, in float32.

    positions: int32 [P], those whose logits are stored. logits: float32 [P, vocab].
    best: int16 [L], the best token after every position. margin: float32 [L], its logit minus the second best.
    codes: by module name, the input of each quantised linear, int8 [L, K], or in a long case uint32 [L], the CRC-32 of
    each row; linears with the same input appear once, under the first name.
    greedy: int16, tokens generated after the input. greedy_margin: float32, at each of them.
    """

    positions: np.ndarray
    logits: np.ndarray
    best: np.ndarray
    margin: np.ndarray
    codes: dict[str, np.ndarray] = field(default_factory=dict)
    greedy: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int16))
    greedy_margin: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))


def digest(codes: np.ndarray) -> np.ndarray:
    """int8 [L, K] -> uint32 [L]: the CRC-32 of each row."""
    return np.array([zlib.crc32(row.tobytes()) for row in np.ascontiguousarray(codes)], np.uint32)


def save(path: Path, golden: Golden) -> None:
    """Write one case."""
    plain = {f.name: getattr(golden, f.name) for f in fields(golden) if f.name != "codes"}
    codes = {f"codes/{name}": value for name, value in golden.codes.items()}
    np.savez_compressed(path, **plain, **codes)  # type: ignore[arg-type]


def load(name: str, folder: Path = DATA) -> Golden:
    """Read one case."""
    with np.load(folder / f"{name}.npz") as file:
        found = {key: file[key] for key in file.files}
    plain = {key: value for key, value in found.items() if not key.startswith("codes/")}
    codes = {key.removeprefix("codes/"): value for key, value in found.items() if key.startswith("codes/")}
    return Golden(**plain, codes=codes)


def manifest(folder: Path = DATA) -> dict[str, Any]:
    """{"made_with": versions, "checkpoints": {case: sha256 of its model.safetensors}}."""
    return json.loads((folder / "manifest.json").read_text())
