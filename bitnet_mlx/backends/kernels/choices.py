"""What was found out about kernels on a chip, in a file below the cache folder.

    <cache>/kernels/<platform>-<hash>.json      {"about": {...}, "entries": {"<question>": {...}}}

The hash covers the chip, MLX's version, the platform, its compiler's version and every file that a kernel is made of,
so an entry holds as long as its file is read. A file that is gone, cut short or not ours counts as empty: the questions
are asked again. Writers take a lock, read what others wrote meanwhile, add their own entry and give the whole a name by
one rename.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from bitnet_mlx.backends.cache_root import VARIABLE, cache_root
from bitnet_mlx.backends.kernels.source import Platform

_log = logging.getLogger(__name__)
_KEEP_DAYS = 60
_MOST_BYTES = 4 << 20  # a file larger than this is not ours


@dataclass(frozen=True)
class Choice:
    """What answers a question, such as "which kernel multiplies this shape".

    label: of the kernel and variant that was chosen; None where stock MLX is. reason: why stock is. fault: the kernel is
    wrong or fails here, which doctor reports as such; slower than stock is none. Times in microseconds, of the chosen
    kernel, of the equally exact stock path in float32 and of stock in bfloat16; None where not measured. ties: codes that
    a rounding of this chip moved by one.
    """

    label: str | None
    reason: str = ""
    fault: bool = False
    time: float | None = None
    stock: float | None = None
    bfloat16: float | None = None
    ties: int = 0


class Choices:
    """Choices by question: in memory, and in the file where it can be written."""

    def __init__(self, platform: Platform, chip: str, version: str, system: str = "") -> None:
        """chip: its name. version: MLX's. system: what compiles kernels, a version of macOS or of a driver."""
        self.about = {
            "platform": platform, "chip": chip, "mlx": version, "system": system, "kernels": kernels_digest(),
        }  # fmt: skip
        name = hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()[:24]
        self.path = cache_root() / "kernels" / f"{platform}-{name}.json"
        self._known: dict[str, Choice] | None = None
        self._kept = True

    def get(self, question: str) -> Choice | None:
        """The answer, if it is known."""
        return self.all().get(question)

    def all(self) -> dict[str, Choice]:
        """Every answer that is known; the file is read once."""
        if self._known is None:
            self._known = self._read()
        return self._known

    def put(self, question: str, choice: Choice) -> None:
        """Remember an answer. Where nothing can be written it lasts as long as this process, and a line says so once."""
        self.all()[question] = choice
        if not self._kept:
            return
        try:
            self._write(question, choice)
        except OSError as error:
            self._kept = False
            _log.warning("[kernels] what was measured is not kept: %s; set %s to a writable folder", error, VARIABLE)

    def forget(self) -> None:
        """Ask every question again."""
        self._known = {}
        with contextlib.suppress(OSError):
            self.path.unlink()

    def _read(self) -> dict[str, Choice]:
        try:
            if self.path.stat().st_size > _MOST_BYTES:
                return {}
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        entries = found.get("entries") if isinstance(found, dict) and found.get("about") == self.about else None
        if not isinstance(entries, dict):
            return {}
        read = {question: _choice(entry) for question, entry in entries.items()}
        return {question: choice for question, choice in read.items() if choice is not None}

    def _write(self, question: str, choice: Choice) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self.path.with_suffix(".lock")):
            entries = {**self._read(), question: choice}
            document = {"about": self.about, "entries": {q: asdict(c) for q, c in sorted(entries.items())}}
            handle, draft = tempfile.mkstemp(prefix=f"{self.path.stem}.", suffix=".draft", dir=self.path.parent)
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    json.dump(document, file, indent=1)
                os.replace(draft, self.path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(draft)
                raise
            _sweep(self.path.parent)


def _choice(entry: Any) -> Choice | None:
    """An entry of the file, or None if any of it is not what a Choice holds."""
    if not isinstance(entry, dict) or set(entry) != {field.name for field in fields(Choice)}:
        return None
    times = [entry[name] for name in ("time", "stock", "bfloat16")]
    sound = (
        (entry["label"] is None or isinstance(entry["label"], str))
        and isinstance(entry["reason"], str)
        and isinstance(entry["fault"], bool)
        and all(t is None or (type(t) in (int, float) and math.isfinite(t) and t > 0) for t in times)
        and type(entry["ties"]) is int
        and entry["ties"] >= 0
    )
    return Choice(**entry) if sound else None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer at a time. On a file system without locks each writes what it has: the last wins."""
    try:
        import fcntl
    except ImportError:  # Windows, where no kernel of ours runs
        yield
        return
    with open(path, "a") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sweep(folder: Path) -> None:
    """Remove what nobody has written to for long: other versions' files, drafts of processes that were killed."""
    oldest = time.time() - _KEEP_DAYS * 86400
    for entry in os.scandir(folder):
        with contextlib.suppress(OSError):  # another process swept it
            if entry.stat().st_mtime < oldest:
                os.unlink(entry.path)


@lru_cache(maxsize=1)
def kernels_digest() -> str:
    """A hash over every file that kernels, their launches and their choice are made of."""
    home = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for path in sorted(home.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    checkout = home.parents[2] / "metal_kernels"
    folder = checkout if checkout.is_dir() else resources.files("bitnet_mlx.metal_kernels")
    for file in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if file.name.endswith((".metal", ".h", ".cu")):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:32]
