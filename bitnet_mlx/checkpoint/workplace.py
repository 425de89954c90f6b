"""Where a model is made before it appears under its name: a hidden folder beside it, renamed when whole.

`.NAME.converting` holds the unfinished model and is locked, which ends with the process: what a killed process left is
found unlocked by the next one, which empties it. `.NAME.replaced` holds, for the moment between two renames, what --force
replaces; a process that was killed in that moment finds it put back by the next.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import TracebackType

from bitnet_mlx.errors import ConfigError, MemoryLimitError

try:
    import fcntl
except ImportError:  # Windows: no lock, so two processes must not write one model at once
    fcntl = None


class Workplace:
    """`with Workplace(destination, force) as place:` make the model in place.path, then call place.publish().

    A destination of a file is made as place.path / NAME. Leaving without publish removes what was made.
    """

    def __init__(self, destination: Path | str, force: bool = False, sources: tuple[Path, ...] = ()) -> None:
        """sources: what is read; it must not be replaced. Raises ConfigError where the destination may not be written."""
        if not os.fspath(destination):
            raise ConfigError("[write] the name to write under is empty; give a folder, or a .gguf file")
        given = Path(destination).expanduser()
        self.destination = Path(os.path.realpath(given))
        self.force = force
        if not self.destination.name:
            raise ConfigError(f"[write] {given} cannot be replaced by a model; give a new name")
        parent = self.destination.parent
        self.path = parent / f".{self.destination.name}.converting"
        self._replaced = parent / f".{self.destination.name}.replaced"
        self._lock: int | None = None
        for source in map(Path, map(os.path.realpath, sources)):
            if any(_same(self.destination, place) for place in (source, *source.parents)):
                raise ConfigError(f"[write] {given} is, or holds, the model that is read; give another name")
            if any(_same(source, place) for place in self.destination.parents):
                raise ConfigError(f"[write] {given} lies inside the model that is read; give another name")
        self._check()

    def _check(self) -> None:
        there = self.destination
        if self._replaced.exists() and not there.exists():
            os.replace(self._replaced, there)
        if not os.path.lexists(there) or (there.is_dir() and not any(there.iterdir())):
            return
        if not self.force:
            what = "is not an empty folder" if there.is_dir() else "is a file"
            raise ConfigError(
                f"[write] {there} exists and {what}; give another name, remove it, or replace it with --force"
            )
        if there.is_dir() and not (there / "config.json").is_file():
            raise ConfigError(
                f"[write] {there} is a folder without config.json, so no model; it is not replaced. Give another name"
            )
        if there.is_file() and there.suffix != ".gguf":
            raise ConfigError(f"[write] {there} is a file and no .gguf; it is not replaced. Give another name")

    def __enter__(self) -> Workplace:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _remove(self._replaced)
            self.path.mkdir(exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"[write] nothing can be made in {self.path.parent} ({error.strerror or error}); give a place that can be "
                "written"
            ) from error
        if fcntl is not None:
            self._lock = os.open(self.path, os.O_RDONLY)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(self._lock)
                raise ConfigError(
                    f"[write] another process is writing {self.destination}; wait for it or give another name"
                ) from error
        for left in self.path.iterdir():
            _remove(left)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)

    def check_room(self, needed: int) -> None:
        """Raise MemoryLimitError where the disk has less than `needed` bytes free."""
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise MemoryLimitError(
                f"[write] {self.destination} needs about {needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB "
                "free; make room or give a place on another disk"
            )

    def publish(self, name: str | None = None) -> Path:
        """Rename the whole model to its destination. name: the file in the folder that is the model, None for all."""
        made = self.path if name is None else self.path / name
        _sync_folder(self.path)
        if self.destination.exists():
            if self.destination.is_dir() and not any(self.destination.iterdir()):
                self.destination.rmdir()
            else:
                os.replace(self.destination, self._replaced)
        os.replace(made, self.destination)
        _remove(self._replaced)
        _sync_folder(self.destination.parent)
        return self.destination


def _same(one: Path, other: Path) -> bool:
    """Whether two resolved paths are one place: on a Mac Model and model are, as a rule."""
    try:
        return one == other or os.path.samefile(one, other)
    except OSError:  # one of them is not there
        return False


def _remove(path: Path) -> None:
    """A folder with all in it, a file, or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_folder(path: Path) -> None:
    """Make renames in a folder last, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
