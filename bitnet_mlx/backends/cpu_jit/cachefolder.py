"""The folder of compiled code: found by a key of everything that the code depends on, checked before it is used.

    <cache>/numba/<key>/...        numba's own files, and checksums.json over them

numba keys its files by one source file's time and reads them unchecked, so an edit elsewhere would go unseen and a
damaged file would end the process. Here the key holds the sources, versions and processor; a folder is used only while
its checksums hold, and appears by one rename, so that processes that compile at once do not meet half a folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path

from bitnet_mlx.backends.cache_root import cache_root

CHECKSUMS = "checksums.json"
_KEEP_DAYS = 60


def key() -> str:
    """Names what compiled code depends on: our sources and where they lie, Python, numba, LLVM, processor, body."""
    import llvmlite
    import numba

    from bitnet_mlx.backends.cpu_jit import isa

    package = Path(__file__).resolve().parents[2]
    sources = [*sorted(Path(__file__).resolve().parent.glob("*.py")), package / "backends" / "numpy_ref.py"]
    digest = hashlib.sha256()
    for path in [*sources, package / "ternary.py"]:
        digest.update(f"{path}\0{path.stat().st_mtime_ns}\0".encode())  # numba checks the time too
        digest.update(path.read_bytes())
    name, features = isa.features()
    versions = (sys.version, platform.machine(), numba.__version__, llvmlite.__version__)
    digest.update(repr((versions, name, sorted(features.items()), isa.body_name())).encode())
    return digest.hexdigest()[:32]


def _sums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder but the list itself."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != CHECKSUMS)
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def is_whole(folder: Path) -> bool:
    """Whether a folder holds exactly what was written into it."""
    try:
        expected = json.loads((folder / CHECKSUMS).read_text())
        return bool(expected) and expected == _sums(folder)
    except (OSError, ValueError):
        return False


def draft(name: str) -> Path:
    """A new private folder beside the one that `name` will have. Raises OSError where nothing can be written."""
    home = cache_root() / "numba"
    home.mkdir(parents=True, exist_ok=True)
    _sweep(home)
    return Path(tempfile.mkdtemp(prefix=f"{name}.", dir=home))


def publish(folder: Path, name: str) -> None:
    """Give a filled draft its name. If another process was first, its folder stays and the draft goes."""
    (folder / CHECKSUMS).write_text(json.dumps(_sums(folder)))
    home = folder.parent
    if (home / name).exists() and not is_whole(home / name):
        aside = Path(tempfile.mkdtemp(prefix="damaged.", dir=home))
        with contextlib.suppress(FileNotFoundError):  # another process has just done so
            os.rename(home / name, aside / name)
        shutil.rmtree(aside, ignore_errors=True)
    try:
        os.rename(folder, home / name)
    except OSError:
        if not (home / name).exists():
            raise
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(home: Path) -> None:
    """Remove what nobody has written to for long: other versions' code, and drafts of processes that were killed."""
    oldest = time.time() - _KEEP_DAYS * 86400
    for entry in os.scandir(home):
        try:
            if entry.stat().st_mtime < oldest:
                shutil.rmtree(entry.path, ignore_errors=True)
        except FileNotFoundError:
            continue  # another process swept it
