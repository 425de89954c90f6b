"""How long a step of M rows takes against one of a single row: measured once, kept in the cache folder.

<cache>/rows/<hash>.json      {"about": {...}, "seconds": {"1": 0.0061, "2": 0.0070, ...}}
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import tempfile
import time
from bisect import bisect_left
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitnet_mlx import __version__
from bitnet_mlx.backends.cache_root import cache_root
from bitnet_mlx.memory.system import processor
from bitnet_mlx.models.decoder import Decoder
from bitnet_mlx.models.owners import holdings

ROWS = (1, 2, 3, 4, 6, 8, 12, 16)
_ROUNDS = 6
_FEW = 4  # rows that are measured however slow the machine is
_BUDGET = 2.0  # seconds; a machine for which that is short has no use for many rows
_BEHIND = 8  # positions that the rows see
_SLOW = 0.02  # seconds of a row, above which rows that cost nearly a row each are not looked at more closely
_NEARLY = 1.8  # what two rows cost then, against one


class RowTimes:
    """Seconds of a step by its rows; between those that were measured, a straight line."""

    def __init__(self, seconds: Mapping[int, float]) -> None:
        """seconds: of at least the row counts 1 and 2, all above 0."""
        self.rows = sorted(seconds)
        self.seconds = [seconds[rows] for rows in self.rows]

    @property
    def one(self) -> float:
        """Seconds of a single row."""
        return self.seconds[0]

    def ratio(self, rows: int) -> float:
        """How many times longer than one row; past the last that was measured, the line goes on."""
        at = min(max(bisect_left(self.rows, rows), 1), len(self.rows) - 1)
        (r0, r1), (t0, t1) = self.rows[at - 1 : at + 1], self.seconds[at - 1 : at + 1]
        return max(t0 + (t1 - t0) * (rows - r0) / (r1 - r0), self.one) / self.one


def row_times(decoder: Decoder) -> RowTimes:
    """From the cache folder, else measured now: the least of a few, of work that a verification does."""
    about = _about(decoder)
    path = cache_root() / "rows" / f"{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]}.json"
    known = _read(path, about)
    if known is None:
        known = measure(decoder)
        _write(path, about, known)
    return RowTimes(known)


def measure(decoder: Decoder) -> dict[int, float]:
    """Seconds of a step by its rows, logits of every row included: the least of a few rounds, never more than more rows take.

    The rounds go over all row counts in turn, so that a busy moment does not fall on one of them alone.
    """
    cache = decoder.make_cache()
    context = decoder.config.max_position_embeddings
    behind = min(_BEHIND, max(1, context - ROWS[-1]))
    decoder.step([[0] * behind], [cache])
    found: dict[int, float] = {}
    began = time.perf_counter()
    for turn in range(_ROUNDS):  # the first may compile or make room, so there are two at least
        for rows in (rows for rows in ROWS if rows <= max(2, context - behind)):
            late = time.perf_counter() - began > _BUDGET
            if (late and (turn > 1 or rows > _FEW)) or (rows > 2 and turn < 2 and _a_row_each(found)):
                break
            start = time.perf_counter()
            decoder.step([[0] * rows], [cache], logits="all")
            seconds = max(time.perf_counter() - start, 1e-9)
            cache.trim(behind)
            found[rows] = min(found.get(rows, seconds), seconds)
        if turn == 1 and _a_row_each(found):
            break
    return {rows: min(s for more, s in found.items() if more >= rows) for rows in found}


def _a_row_each(found: Mapping[int, float]) -> bool:
    """Whether the engine is slow and two rows take nearly twice one's time: then no number of them will pay."""
    return found[1] > _SLOW and found[2] > _NEARLY * found[1]


def _about(decoder: Any) -> dict[str, Any]:
    about = {
        "version": __version__, "backend": decoder.name, "config": repr(decoder.config), "machine": platform.machine(),
        "processor": processor(), "cores": os.cpu_count(), "dtype": getattr(decoder, "dtype", None),
        "kv_bits": getattr(decoder, "kv_bits", None), "bytes": holdings(decoder),
    }  # fmt: skip
    about["bytes"].pop("activations", None)
    if decoder.name == "cpu":
        from bitnet_mlx.backends.cpu_jit.threads import get_threads

        about["threads"] = get_threads()
    return about


def _read(path: Path, about: Mapping[str, Any]) -> dict[int, float] | None:
    """What was measured; None where the file is gone, damaged or another's."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        seconds = {int(rows): float(value) for rows, value in held["seconds"].items()}
        right = held["about"] == json.loads(json.dumps(about)) and {1, 2} <= set(seconds) <= set(ROWS)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return seconds if right and all(0 < value < 1e4 for value in seconds.values()) else None


def _write(path: Path, about: Mapping[str, Any], seconds: Mapping[int, float]) -> None:
    """Keep it; where nothing can be written it is measured again the next time."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump({"about": about, "seconds": seconds}, file)
        os.replace(file.name, path)
