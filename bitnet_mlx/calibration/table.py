"""A calibration as text."""

from __future__ import annotations

from typing import Any

from bitnet_mlx.calibration.clips import METHODS


def table(record: dict[str, Any]) -> str:
    """Lines of `calibrate`'s record, for a terminal: an input a line, then what clips and layers cost."""
    names = [entry["name"].removeprefix("model.layers.") for entry in record["inputs"]]
    width = max(map(len, names))
    lines = [
        f"{record['model']} on {record['backend']}: {record['samples']} stretches of {record['length']} tokens, "
        f"perplexity {record['perplexity']:.4f}",
        "",
        f"  {'input of':<{width}}{'min':>10}{'max':>10}{'rms':>10}{'zeros':>8}{'int8 dB':>9}"
        + "".join(f"{f'{method} clip':>17}" for method in METHODS[1:]),
    ]
    for name, entry in zip(names, record["inputs"], strict=True):
        sqnr = "" if entry["int8_sqnr_db"] is None else f"{entry['int8_sqnr_db']:.1f}"
        clips = "".join(f"{entry['clips'][m]:>10.4g}{_share(entry['clipped'][m]):>7}" for m in METHODS[1:])
        lines.append(
            f"  {name:<{width}}{entry['min']:>10.4g}{entry['max']:>10.4g}{entry['rms']:>10.4g}"
            f"{entry['zeros']:>8.1%}{sqnr:>9}{clips}"
        )
    lines.append("  beside a clip: the share of values beyond it")
    if record["losses"]:
        lines += ["", "  nats a token of this text, with every linear's input clipped"]
        lines += [f"  {_method(m):<24}{nats:.5f}" for m, nats in record["losses"].items()]
    lines += ["", *_layers(record)]
    return "\n".join(lines)


def _method(name: str) -> str:
    return "absmax (no clip)" if name == "absmax" else name


def _share(value: float) -> str:
    return "0" if value == 0 else f"{value:.2%}" if value >= 1e-4 else "<.01%"


def _layers(record: dict[str, Any]) -> list[str]:
    lines = ["  error of a layer's outputs with ternary weights and int8 inputs, share of their power"]
    if not record["float_weights"]:
        lines = ["  error of a layer's outputs from int8 inputs, share of their power"]
    for entry in record["layers"]:
        loss = (
            f"   {entry['nats_per_token']:+.4f} nats a token when it alone is so" if "nats_per_token" in entry else ""
        )
        lines.append(f"  layer {entry['layer']:<4}{entry['noise']:>12.3e}{loss}")
    keep = ", ".join(map(str, record["keep"])) or "none"
    return [*lines, "", f"  layers to keep at higher precision: {keep} ({record['keep_rule']})"]
