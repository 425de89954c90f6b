"""What a tracker hands out: plain data. Bytes and seconds; None is what this machine does not tell."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from bitnet_mlx.memory.mlx_counters import Limits

OWNERS: tuple[str, ...] = ("weights", "head", "kv_cache", "activations", "tokenizer", "other")


@dataclass(frozen=True)
class Reading:
    """The counters at one moment; time_s counts from the tracker's start.

    mlx_*: None where MLX is not in use. rss: mapped pages of weight files included. footprint: macOS alone.
    """

    time_s: float
    mlx_active: int | None = None
    mlx_cache: int | None = None
    mlx_peak: int | None = None
    rss: int | None = None
    footprint: int | None = None
    available: int | None = None

    @property
    def used(self) -> int:
        """This process's memory: the largest of footprint, resident set and MLX's active plus cached bytes.

        No one of them holds all: the resident set leaves out what an NVIDIA GPU holds, MLX counts its own arrays alone.
        """
        mlx = (self.mlx_active or 0) + (self.mlx_cache or 0)
        return max(self.footprint or 0, self.rss or 0, mlx)


@dataclass(frozen=True)
class Snapshot:
    """Everything at one moment. owners: bytes by name of OWNERS; "other" is what `reading.used` has beside them."""

    reading: Reading
    owners: dict[str, int]
    scope: str
    level: str
    limit: int | None
    total: int | None
    mlx_limits: Limits

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "used": self.reading.used}


@dataclass(frozen=True)
class Sample:
    """One point of the timeline."""

    time_s: float
    used: int
    mlx_active: int | None
    owners: dict[str, int]
    scope: str


@dataclass
class ScopeRecord:
    """One passage through a named scope. name: with the scopes around it, "generate/prefill".

    peak_used: the most that this process had in it; exact where it set a new record for the process, else the largest
    sample. mlx_peak: MLX's own peak inside, exact. grew: bytes that stayed. owners: of the bytes at the end.
    """

    name: str
    thread: str
    start_s: float
    before: Reading
    seconds: float = 0.0
    after: Reading | None = None
    peak_used: int = 0
    mlx_peak: int | None = None
    owners: dict[str, int] = field(default_factory=dict)
    owner_peaks: dict[str, int] = field(default_factory=dict)

    @property
    def grew(self) -> int | None:
        """Bytes that the process kept; None while the scope is open."""
        return None if self.after is None else self.after.used - self.before.used

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "grew": self.grew}


@dataclass(frozen=True)
class Leak:
    """Something registered inside a scope that is alive after it. held_by: what refers to it, the nearest first."""

    scope: str
    owner: str
    label: str
    nbytes: int
    age_s: float
    held_by: tuple[str, ...]

    def __str__(self) -> str:
        holders = "; ".join(self.held_by) or "a local variable of a running function"
        return (
            f"{self.label} ({self.owner}, {self.nbytes} bytes) outlived scope {self.scope!r} by {self.age_s:.1f} s; "
            f"held by {holders}"
        )


@dataclass(frozen=True)
class PressureEvent:
    """What a call-back is told. share: of the limit that is used."""

    level: str
    share: float
    used: int
    limit: int
    time_s: float
