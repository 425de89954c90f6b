"""A tracker for people: a table in the terminal, HTML in a notebook."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bitnet_mlx.memory.tracker import MemoryTracker

_UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))
STYLE = "border-collapse:collapse;font-variant-numeric:tabular-nums"
CELL = "padding:2px 10px;text-align:right;border-bottom:1px solid currentColor"


def size(nbytes: int | None) -> str:
    """12.3 MiB; a dash for what is not known."""
    if nbytes is None:
        return "-"
    for unit, name in _UNITS:
        if abs(nbytes) >= unit:
            return f"{nbytes / unit:.1f} {name}"
    return f"{nbytes} B"


def html_table(head: list[str], rows: list[list[str]], caption: str = "") -> str:
    """Colours are the page's own, so that it reads in dark and light."""
    cells = "".join(f'<th style="{CELL}">{escape(name)}</th>' for name in head)
    body = "".join(
        "<tr>" + "".join(f'<td style="{CELL}">{escape(value)}</td>' for value in row) + "</tr>" for row in rows
    )
    title = f'<caption style="text-align:left;font-weight:600">{escape(caption)}</caption>' if caption else ""
    return f'<table style="{STYLE}">{title}<thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>'


def text_table(head: list[str], rows: list[list[str]]) -> str:
    """The first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = []
    for row in [head, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0] = row[0].ljust(widths[0])
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _now(tracker: MemoryTracker) -> list[list[str]]:
    shot = tracker.snapshot()
    reading, limits = shot.reading, shot.mlx_limits
    values: list[tuple[str, int | None]] = [
        ("in use", reading.used), ("peak in use", tracker.peak_used), ("resident set", reading.rss),
        ("footprint", reading.footprint), ("MLX active", reading.mlx_active), ("MLX cache", reading.mlx_cache),
        ("MLX peak", tracker.peak_mlx), ("MLX memory limit", limits.memory), ("MLX cache limit", limits.cache),
        ("MLX wired limit", limits.wired), ("limit", shot.limit), ("machine", shot.total),
        ("available", reading.available),
    ]  # fmt: skip
    return [[name, size(value)] for name, value in values] + [["pressure", shot.level]]


def _scopes(tracker: MemoryTracker) -> list[list[str]]:
    return [[s.name, f"{s.seconds:.3f}", size(s.peak_used), size(s.mlx_peak), size(s.grew)] for s in tracker.scopes]


_SCOPE_HEAD = ["scope", "seconds", "peak", "MLX peak", "grew"]


def tracker_table(tracker: MemoryTracker) -> str:
    """Counters, owners, scopes and leaks."""
    owners = [[name, size(nbytes)] for name, nbytes in tracker.owners().items()]
    parts = [text_table(["memory", "now"], _now(tracker)), text_table(["owner", "now"], owners)]
    if tracker.scopes:
        parts.append(text_table(_SCOPE_HEAD, _scopes(tracker)))
    parts += [f"leak: {leak}" for leak in tracker.leaks()]
    return "\n\n".join(parts)


def tracker_html(tracker: MemoryTracker) -> str:
    """The same for a notebook."""
    owners = [[name, size(nbytes)] for name, nbytes in tracker.owners().items()]
    parts = [
        html_table(["", "now"], _now(tracker), "Memory"),
        html_table(["owner", "now"], owners),
        html_table(_SCOPE_HEAD, _scopes(tracker)) if tracker.scopes else "",
        *(f"<p>leak: {escape(str(leak))}</p>" for leak in tracker.leaks()),
    ]
    return "<div>" + "".join(parts) + "</div>"
