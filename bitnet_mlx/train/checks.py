"""What the options of every kind of training have in common."""

from __future__ import annotations

from collections.abc import Sequence

from bitnet_mlx.errors import ConfigError


def check_numbers(command: str, options: object, positive: Sequence[str], above_zero: Sequence[str]) -> None:
    """Raise ConfigError, naming the flag, unless the counts in `positive` are 1 or more and the others finite and above 0."""
    for name in positive:
        value = getattr(options, name)
        if value < 1:
            raise ConfigError(f"[{command}] {flag(name)} is {value}; 1 or more is allowed")
    for name in above_zero:
        value = getattr(options, name)
        if not 0 < value < float("inf"):
            raise ConfigError(f"[{command}] {flag(name)} is {value}; give a number above 0")


def flag(name: str) -> str:
    """The command line's spelling of an option."""
    return f"--{name.replace('_', '-')}"
