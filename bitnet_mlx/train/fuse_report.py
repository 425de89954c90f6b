"""A fusion told to people."""

from __future__ import annotations

from typing import Any

from bitnet_mlx.checkpoint.report import size

_NAMES = {"base": "base", "adapter": "base and adapter", "fused": "fused"}
_FIGURES = (("perplexity", "perplexity", ".4g"), ("bits_per_byte", "bits a byte", ".4f"), ("kl", "KL", ".4g"),
            ("top1_agreement", "same best token", ".1%"))  # fmt: skip
_COLUMNS = (("delta", "adapter/|W|"), ("relative_error", "error/|W|"), ("lost", "lost"), ("absmean_lost", "by absmean"))


def report(record: dict[str, Any]) -> list[str]:
    """A line for each linear that has an adapter, what all of them lose, the figures on text, and where the model is."""
    layers = record["layers"]
    width = max(map(len, layers), default=0)
    lines = [" " * width + "".join(f"{title:>13}" for _, title in _COLUMNS)]
    lines += [f"{module:<{width}}{_cells(layer)}" for module, layer in layers.items()]
    lines.append(f"{'all':<{width}}{_cells(record)}")
    lines.append("lost: the difference to weight and adapter, in adapters; 1 is what leaving the adapter out costs")
    if "quality" in record:
        lines += ["", " " * 18 + "".join(f"{title:>17}" for _, title, _ in _FIGURES)]
        lines += [f"{_NAMES[name]:<18}{_quality(record['quality'][name])}" for name in _NAMES]
    lines += ["", *(f"note: {notice}" for notice in record["notices"])]
    return [*lines, f"{record['path']}: {record['format']}, {size(record['bytes_out'])}"]


def _cells(layer: dict[str, Any]) -> str:
    values = [layer.get(name) for name, _ in _COLUMNS]
    return "".join(f"{'' if value is None else format(value, '.2%'):>13}" for value in values)


def _quality(figures: dict[str, float]) -> str:
    return "".join(f"{format(figures[name], form) if name in figures else '':>17}" for name, _, form in _FIGURES)
