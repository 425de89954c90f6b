"""Files that cannot be written, as one clear error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bitnet_mlx.errors import TrainError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises TrainError where what is inside fails to write `path`, as on a full disk. MLX's writer raises RuntimeError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise TrainError(
            f"[train] {path} could not be written: {error}; the last checkpoint stays. Make room on the disk, and go on with "
            "--resume"
        ) from error
