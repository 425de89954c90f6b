"""The committed goldens: one compressed npz for each case, and a manifest with the checkpoints' sha256."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

DATA = Path(__file__).parent / "data"


@dataclass
class Golden:
    """What transformers computed for one case, in float32.

    positions: int32 [P], those whose logits and codes are stored. logits: float32 [P, vocab]. argmax: int16 [L], everywhere.
    codes: int8 [P, K] by module name, the input of each quantised linear; linears with the same input appear once,
    under the first name. digests: uint32 [L] by module name, the CRC-32 of the codes at every position.
    greedy: tokens generated after the input; margins: float32, top logit minus second at each of those steps.
    """

    positions: np.ndarray
    logits: np.ndarray
    argmax: np.ndarray
    codes: dict[str, np.ndarray] = field(default_factory=dict)
    digests: dict[str, np.ndarray] = field(default_factory=dict)
    greedy: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int16))
    margins: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))


def digest(codes: np.ndarray) -> np.ndarray:
    """int8 [L, K] -> uint32 [L]: the CRC-32 of each row."""
    return np.array([zlib.crc32(row.tobytes()) for row in np.ascontiguousarray(codes)], np.uint32)


def save(path: Path, golden: Golden) -> None:
    """Write one case."""
    plain = {name: getattr(golden, name) for name in ("positions", "logits", "argmax", "greedy", "margins")}
    codes = {f"codes/{name}": value for name, value in golden.codes.items()}
    digests = {f"digests/{name}": value for name, value in golden.digests.items()}
    np.savez_compressed(path, **plain, **codes, **digests)  # type: ignore[arg-type]


def load(name: str, folder: Path = DATA) -> Golden:
    """Read one case."""
    with np.load(folder / f"{name}.npz") as file:
        found = {key: file[key] for key in file.files}
    plain = {key: value for key, value in found.items() if "/" not in key}

    def under(prefix: str) -> dict[str, np.ndarray]:
        return {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}

    return Golden(**plain, codes=under("codes/"), digests=under("digests/"))


def manifest(folder: Path = DATA) -> dict[str, Any]:
    """{"made_with": versions, "checkpoints": {case: sha256 of its model.safetensors}}."""
    return json.loads((folder / "manifest.json").read_text())
