"""A measurement with a verdict: the figures are measured once, and anybody can decide again from the figures alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Figures = Mapping[str, Any]


class Verdict(NamedTuple):
    """`ok`: nothing to mend. name: the verdict in a word or two. reason: the figures behind it, for people."""

    ok: bool
    name: str
    reason: str


Decide = Callable[[Figures], Verdict]


def judged(figures: Figures, decide: Decide) -> dict[str, Any]:
    """The figures with their verdict, for a record."""
    verdict = decide(figures)
    return {**figures, "ok": verdict.ok, "verdict": verdict.name, "reason": verdict.reason}


def percent(share: float) -> str:
    """A share for people."""
    return f"{share:.0%}"


def milliseconds(seconds: float) -> str:
    """A time for people."""
    return f"{seconds * 1e3:.3g} ms"


def megabytes(count: float) -> str:
    """Bytes for people."""
    return f"{count / 1e6:.3g} MB"
