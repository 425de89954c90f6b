"""Where, when and with what a record was made."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitnet_mlx import __version__
from bitnet_mlx.backends import ON_MLX
from bitnet_mlx.memory.system import processor

_PACKAGES = ("mlx", "mlx-lm", "numpy", "numba", "tbb")


def stamp(backend: str) -> dict[str, Any]:
    """Machine, system, versions, commit, command, date and load: the same fields in every record."""
    found: dict[str, Any] = {
        "machine": platform.machine(), "system": platform.platform(), "processor": processor(), "cores": os.cpu_count(),
        "memory_bytes": _memory(), "python": platform.python_version(), "version": __version__,
        "packages": {name: installed(name) for name in _PACKAGES}, "commit": commit(), "command": command(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "load_average": _load(),
    }  # fmt: skip
    if backend in ON_MLX:
        from bitnet_mlx.bench.decode_mlx import device

        found |= device()
    if backend == "cpu":
        from bitnet_mlx.backends.cpu_jit import isa, threads

        found |= {"body": isa.body_name(), "threads": threads.get_threads(), "layer": threads.threading_layer()}
    return found


def append(record: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Add a record to a file of them, one a line. Raises OSError."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def commit() -> str | None:
    """The commit of the source tree that this package runs from, "-dirty" where files differ; None once installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--match", "no-tag"],
            capture_output=True, text=True, timeout=20, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def command() -> str:
    """The command line, without the folder that the program lies in."""
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])


def installed(package: str) -> str | None:
    """A package's version; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory() -> int | None:
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _load() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
