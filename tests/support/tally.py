"""What a test session ran on the emulated grid: counted in each process, and put together from several."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Tally:
    """tests: those that emulated something. runs: grids. kernels: names of the libraries loaded. by: the compiler."""

    tests: set[str] = field(default_factory=set)
    runs: int = 0
    kernels: set[str] = field(default_factory=set)
    by: str = ""

    def record(self) -> dict[str, Any]:
        """Plain values, to send to another process."""
        return {name: sorted(value) if isinstance(value, set) else value for name, value in asdict(self).items()}

    def add(self, record: dict[str, Any]) -> None:
        """Add what another process counted."""
        self.tests |= set(record["tests"])
        self.runs += record["runs"]
        self.kernels |= set(record["kernels"])
        self.by = self.by or record["by"]

    def line(self) -> str:
        """One line for the end of a test session; empty where nothing was emulated."""
        if not self.tests:
            return ""
        return f"Metal emulator: {len(self.tests)} tests ran {self.runs} grids of {len(self.kernels)} kernels, by {self.by}"


here = Tally()  # of this process
