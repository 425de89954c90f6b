"""Versions of the libraries that serve as oracles: Python 3.10 gets older ones."""

from __future__ import annotations

from importlib.metadata import version


def installed(name: str) -> tuple[int, ...]:
    """The first two numbers of an installed distribution's version."""
    return tuple(int(part) for part in version(name).split(".")[:2])
