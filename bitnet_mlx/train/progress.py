"""What a person sees while training runs."""

from __future__ import annotations

import sys
from typing import Any


class Progress:
    """A bar on a terminal, plain lines elsewhere; all on stderr."""

    def __init__(self, iters: int) -> None:
        self.iters = iters
        self.bar: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
            self.bar = Bar(*columns, console=Console(stderr=True))
            self.bar.start()
            self.task = self.bar.add_task("compiling", total=self.iters)
        return self

    def __exit__(self, *exc: object) -> None:
        if self.bar:
            self.bar.stop()

    def report(self, entry: dict[str, Any]) -> None:
        """Show one record of the loop."""
        text = (
            f"step {entry['step']}/{self.iters}  loss {entry['loss']:.4f}  {entry['tokens_per_second']:,.0f} tokens/s"
        )
        if self.bar:
            self.bar.update(self.task, completed=entry["step"], description=text)
        else:
            sys.stderr.write(f"{text}  {entry['seconds']:.0f} s\n")
