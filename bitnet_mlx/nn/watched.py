"""Modules that count every change made to any of them, so that who looked at many need not look again."""

from __future__ import annotations

from typing import Any

from bitnet_mlx.backends.mlx_import import nn

_changes = 0


def changes() -> int:
    """How many changes all watched modules have seen: arrays, children, modes and numbers set or taken away."""
    return _changes


class Watched(nn.Module):
    """An nn.Module whose every assignment counts. (MLX's own ways to change a module all assign.)"""

    def __setattr__(self, name: str, value: Any) -> None:
        _count()
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        _count()
        super().__delattr__(name)

    def __setitem__(self, name: str, value: Any) -> None:
        _count()
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        _count()
        super().__delitem__(name)


def _count() -> None:
    global _changes
    _changes += 1
