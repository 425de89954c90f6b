"""A progress bar for work whose size is known."""

from __future__ import annotations

import sys
from typing import Any


class Bar:
    """A bar on a terminal, nothing elsewhere; on stderr."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._bar: Any = None

    def __enter__(self) -> Bar:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self._text, total=None)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, done: int, total: int) -> None:
        """Show how much of `total` is done."""
        if self._bar:
            self._bar.update(self._task, completed=done, total=total)
