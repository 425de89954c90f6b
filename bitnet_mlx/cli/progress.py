"""A progress bar for work whose size is known."""

from __future__ import annotations

import sys
from typing import Any


class Bar:
    """A bar on a terminal, elsewhere nothing, or plain lines; all on stderr. remains: the bar stays at the end."""

    def __init__(self, text: str, remains: bool = False) -> None:
        self._text, self._remains = text, remains
        self._bar: Any = None

    def __enter__(self) -> Bar:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=not self._remains)
            self._bar.start()
            self._task = self._bar.add_task(self._text, total=None)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, done: int, total: int, text: str | None = None, line: str | None = None) -> None:
        """Show how much of `total` is done. text: beside the bar from now on. line: printed where there is no bar."""
        if self._bar:
            self._bar.update(self._task, completed=done, total=total, description=text)
        elif line is not None:
            sys.stderr.write(line + "\n")
