"""Small HTML for notebooks: tables that take the page's own colours, so they read in dark and in light."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_CELL = "padding:2px 10px;text-align:{};border-bottom:1px solid #7676764d"


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table; its first column is text, the others are numbers."""
    sides = ["left", *["right"] * (len(head) - 1)]

    def row(tag: str, cells: Sequence[object]) -> str:
        return "".join(
            f"<{tag} style='{_CELL.format(side)}'>{escape(str(cell))}</{tag}>"
            for side, cell in zip(sides, cells, strict=True)
        )

    body = "".join(f"<tr>{row('td', cells)}</tr>" for cells in rows)
    return (
        f"<table style='border-collapse:collapse'><caption style='text-align:left'>{escape(title)}</caption>"
        f"<tr>{row('th', head)}</tr>{body}</table>"
    )


class Record(dict[str, Any]):
    """A benchmark's JSON record, which a notebook shows as a table of its single figures and its small tables."""

    def _repr_html_(self) -> str:
        title = f"bench {self.get('bench', '')} on {self.get('backend', self.get('machine', ''))}"
        return table(title, ["", "value"], [(name, _shown(value)) for name, value in _flat(self) if _short(value)])


def _flat(values: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    """Nested names joined by dots."""
    found = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{before}{name}.")
        else:
            found.append((f"{before}{name}", value))
    return found


def _short(value: object) -> bool:
    return value is not None and (not isinstance(value, (list, tuple)) or len(value) <= 4)


def _shown(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
