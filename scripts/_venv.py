"""Makes .venv at the root and installs the package into it, editable: `_venv.py ROOT EXTRAS`.

Nothing is done when pyproject.toml is that of the last time and no extra is missing: a ready .venv works offline.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import venv
from pathlib import Path

GLIBC = (2, 35)  # what the pinned mlx wheels for Linux are built for


def unsupported() -> str:
    """Why the pinned wheels cannot be installed on this machine, or ""."""
    if sys.platform != "linux":
        return ""
    library, version = platform.libc_ver()
    number = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if library == "glibc" and number >= GLIBC:
        return ""
    wanted = ".".join(map(str, GLIBC))
    return (
        f"mlx has wheels for glibc {wanted} and later (Ubuntu 22.04, Debian 12, Fedora 36); "
        f"this system has {library or 'another C library'} {version}"
    )


def note() -> str:
    """What a user should know before a long install, or ""."""
    if sys.platform == "darwin" and platform.machine() == "x86_64":
        return "This Python is for Intel Macs: it runs the CPU engines, not MLX. On Apple silicon take an arm64 Python."
    return ""


def fingerprint(root: Path) -> str:
    """Changes whenever the installation must be renewed."""
    parts = [(root / "pyproject.toml").read_bytes(), str(root).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


class Environment:
    """The virtual environment at root/.venv."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / ".venv"
        self.python = self.folder / "bin" / "python"
        self.stamp = self.folder / "bitnet-mlx.json"
        self.log = self.folder / "bitnet-mlx-setup.log"

    def works(self) -> bool:
        """Whether its Python runs, is one that we support, and has pip."""
        code = "import sys, pip; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 15))"
        try:
            return subprocess.run([str(self.python), "-c", code], capture_output=True).returncode == 0
        except OSError:
            return False

    def installed(self) -> set[str]:
        """The extras of the last whole installation of this very project; "" stands for the package itself."""
        try:
            record = json.loads(self.stamp.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return set()
        return set(record["extras"]) if record["fingerprint"] == fingerprint(self.root) else set()

    def create(self) -> None:
        """A new environment. A folder that is there and is no virtual environment is not ours to empty."""
        if self.folder.exists() and not (self.folder / "pyvenv.cfg").exists() and any(self.folder.iterdir()):
            sys.exit(f"{self.folder} is there and is not a virtual environment; move it away and run this again")
        print(f"Making {self.folder} with Python {platform.python_version()}.", flush=True)
        venv.create(self.folder, clear=True, with_pip=True)

    def install(self, extras: set[str]) -> None:
        """Install the package, editable, with the extras; wheels only, so that no compiler runs."""
        self.stamp.unlink(missing_ok=True)
        named = ",".join(sorted(extras - {""}))
        target = f"{self.root}[{named}]" if named else str(self.root)
        print(f"Installing bitnet-mlx{f' [{named}]' if named else ''}: once, a few minutes on a slow line.", flush=True)
        self.pip("install", "pip>=23.1")
        self.pip("install", "--only-binary=:all:", "--editable", target)
        record = {"fingerprint": fingerprint(self.root), "extras": sorted(extras)}
        part = self.stamp.with_suffix(".part")
        part.write_text(json.dumps(record), encoding="utf-8")
        os.replace(part, self.stamp)

    def pip(self, *arguments: str) -> None:
        """Run pip; what it says goes to a file, whose end is shown when it fails."""
        command = [str(self.python), "-m", "pip", "--disable-pip-version-check", *arguments]
        with self.log.open("w", encoding="utf-8") as log:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        if done.returncode:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
            text = "\n".join(lines[-20:])
            sys.exit(
                f"{text}\nSet-up failed; {self.log} has all of it. The first installation needs the package index."
            )


def main(root: Path, extras: set[str]) -> None:
    """Bring root/.venv to what is wanted, or do nothing."""
    environment = Environment(root)
    if not environment.works():
        reason = unsupported()
        if reason:
            sys.exit(reason)
        if note():
            print(note(), file=sys.stderr)
        environment.create()
    wanted = {"", *extras}
    there = environment.installed()
    if not wanted <= there:
        environment.install(wanted | there)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), {extra for extra in sys.argv[2].split(",") if extra})
