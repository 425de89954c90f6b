"""Pictures of records, by matplotlib, as PNG or as one HTML file with an SVG in it.

Grounds are transparent and every colour has a middling brightness, so that a picture reads on white and on black: each
has a contrast of 3:1 or more to both, the grey of the letters 4.5:1.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from bitnet_mlx.errors import ConfigError

INK = "#767676"
COLOURS = ("#2a84d2", "#cf6a1d", "#2c9350", "#b052c0", "#a87b00", "#c8505f", "#12909a", "#7f7fd0", "#8a8a3c", "#909090")
MARKS = "os^DvPX*<>"
_BINS = 32  # of a histogram, drawn as one
_LEAST = 0.25  # MB that a memory axis shows at least
_LOSSES = ("loss", "cross_entropy", "kl", "hidden", "attention", "valid_loss")
_SUFFIXES = (".png", ".html")


def check_path(path: str | Path) -> None:
    """Raises ConfigError where a picture cannot be written: another kind of file, or no matplotlib."""
    import importlib.util

    if Path(path).suffix not in _SUFFIXES:
        raise ConfigError(f"[plot] {path} was given; a path that ends in {' or '.join(_SUFFIXES)} is needed")
    if not importlib.util.find_spec("matplotlib"):
        raise ConfigError("[plot] matplotlib is not installed; pip install 'bitnet-mlx[plot]'")


def draw(record: Mapping[str, Any], path: str | Path) -> None:
    """The picture of a record, by its kind. Raises ConfigError for a kind without one; see check_path; OSError."""
    check_path(path)
    kind = _kind(record)
    if kind not in DRAWERS:
        raise ConfigError(f"[plot] there is no picture of {kind!r}; of {', '.join(DRAWERS)} there is")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: Any = {
        "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
        "axes.titlecolor": INK, "grid.color": INK, "grid.alpha": 0.25, "font.size": 10, "svg.fonttype": "none",
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "axes.facecolor": "none",
    }  # fmt: skip
    with rc_context(style):
        figure = Figure(figsize=(9, 5), layout="constrained", facecolor="none")
        DRAWERS[kind](figure, record)
        _save(figure, Path(path), _title(record))


def _kind(record: Mapping[str, Any]) -> Any:
    return record.get("bench") or record.get("kind")


def _title(record: Mapping[str, Any]) -> str:
    where = record.get("device_name") or record.get("processor") or record.get("machine", "")
    return f"bitnet-mlx {_kind(record)}: {record.get('backend', '')} on {where}"


def _save(figure: Any, path: Path, title: str) -> None:
    figure.suptitle(title, fontsize=11)
    if path.suffix == ".png":
        figure.savefig(path, dpi=144)
        return
    text = io.StringIO()
    figure.savefig(text, format="svg")
    svg = text.getvalue()
    page = (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{escape(title)}</title>"
        "<style>:root{color-scheme:light dark}body{margin:2rem}svg{max-width:100%;height:auto}</style>"
        f"<body>{svg[svg.index('<svg') :]}</body></html>"
    )
    path.write_text(page, encoding="utf-8")


def _axes(figure: Any, place: int, title: str, x: str, y: str) -> Any:
    axes = figure.add_subplot(place)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(visible=True)
    return axes


def _no_label(_value: float, _place: int | None) -> str:
    return ""


def _decades(low: float, high: float) -> tuple[float, float]:
    """Whole powers of ten around both, so that a logarithmic axis has numbers on it."""
    return 10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high))


def roofline(figure: Any, record: Mapping[str, Any]) -> None:
    """A profile: where each part's bandwidth lies under the copy's, and where the token's time goes."""
    decode, copy = record["decode"], record["copy_bandwidth"] / 1e9
    axes = _axes(figure, 121, "Roofline of a token", "ms of a token", "GB/s moved")
    axes.axhline(copy, color=INK, linestyle="--", linewidth=1)
    axes.text(0.99, copy * 1.08, f"copy {copy:.1f} GB/s", ha="right", transform=axes.get_yaxis_transform())
    for i, (name, part) in enumerate(decode["parts"].items()):
        if name != "host" and part["bytes"] and part["bandwidth"] > 0:
            axes.scatter(part["seconds"] * 1e3, part["bandwidth"] / 1e9, color=COLOURS[i], marker=MARKS[i], label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(*_decades(*axes.get_xlim()))
    axes.set_ylim(*_decades(*axes.get_ylim()))
    axes.xaxis.set_minor_formatter(_no_label)
    axes.yaxis.set_minor_formatter(_no_label)
    axes.legend(fontsize=8, loc="best")
    bars = _axes(figure, 122, f"{decode['token_s'] * 1e3:.2f} ms a token", "ms", "")
    names = list(decode["parts"])
    times = [decode["parts"][name]["seconds"] * 1e3 for name in names]
    bars.barh(range(len(names)), times, color=COLOURS[: len(names)])
    bars.set_yticks(range(len(names)), names)
    bars.invert_yaxis()
    for i, ms in enumerate(times):
        bars.text(ms, i, f" {decode['parts'][names[i]]['share']:.0%}", va="center", fontsize=8)
    bars.set_xlim(0, max(times) * 1.15)


def _band(axes: Any, points: list[Mapping[str, Any]], x: str, colour: int, label: str) -> None:
    """p50 with its p20 to p80 band; tokens a second, from seconds."""
    at = [p[x] for p in points]
    axes.plot(at, [p["tokens"] / p["p50"] for p in points], color=COLOURS[colour], marker=MARKS[colour], label=label)
    axes.fill_between(
        at, [p["tokens"] / p["p80"] for p in points], [p["tokens"] / p["p20"] for p in points],
        color=COLOURS[colour], alpha=0.25, linewidth=0,
    )  # fmt: skip


def scaling(figure: Any, record: Mapping[str, Any]) -> None:
    """Decode speed by context, and the curve over M, the rows of one pass."""
    axes = _axes(figure, 121, "Decode speed by context", "positions held", "tokens/s")
    _band(axes, record["context"], "positions", 0, record["backend"])
    axes.set_ylim(bottom=0)
    rows = _axes(figure, 122, "M curve: tokens of one pass", "M", "tokens/s")
    _band(rows, record["rows"], "m", 1, record["backend"])
    rows.set_xscale("log", base=2)
    rows.set_yscale("log")
    rows.set_xticks([p["m"] for p in record["rows"]], [str(p["m"]) for p in record["rows"]])


def timeline(figure: Any, record: Mapping[str, Any]) -> None:
    """Memory of a run from an empty cache, and of the same work again and again."""
    for place, key, title in ((121, "run", "Memory of a run"), (122, "rounds", "The same work again and again")):
        axes = _axes(figure, place, title, "tokens", "MB")
        points = record[key]
        at = [p["tokens"] for p in points]
        for i, name in enumerate(n for n in points[0] if n not in ("tokens", "peak_rss_bytes")):
            values = [p[name] / 1e6 for p in points]
            axes.plot(at, values, color=COLOURS[i], linestyle=("-", "--")[i % 2], label=name.replace("_", " "))
        axes.set_ylim(0, max(_LEAST, 1.1 * axes.get_ylim()[1]))  # bytes that nobody minds must not look like a climb
        axes.legend(fontsize=8)


def owners(figure: Any, record: Mapping[str, Any]) -> None:
    """A tracker's timeline: bytes by owner, one on another, and all that the process has."""
    axes = _axes(figure, 111, "Memory by owner", "seconds", "MB")
    points = record["timeline"]
    at = [p["time_s"] for p in points]
    names = [name for name in points[0]["owners"] if name != "other"]
    parts = [[p["owners"][name] / 1e6 for p in points] for name in names]
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(names))]
    axes.stackplot(at, parts, labels=[name.replace("_", " ") for name in names], colors=colours, alpha=0.8)
    axes.set_ylim(bottom=0)
    whole = axes.twinx()
    whole.plot(at, [p["used"] / 1e6 for p in points], color=INK, linestyle="--", label="process (right)")
    whole.set_ylabel("MB of the process")
    whole.set_ylim(bottom=0)
    for scope in record["scopes"]:
        if "/" not in scope["name"]:
            axes.axvline(scope["start_s"], color=INK, alpha=0.4, linewidth=0.8)
            at = (scope["start_s"], 0.97)  # inside the frame, below the title
            axes.annotate(f" {scope['name']}", at, xycoords=("data", "axes fraction"), fontsize=8)
    lines, labels = axes.get_legend_handles_labels()
    more, names_too = whole.get_legend_handles_labels()
    figure.legend(lines + more, labels + names_too, fontsize=8, loc="outside lower center", ncols=6)


def training(figure: Any, record: Mapping[str, Any]) -> None:
    """A training run's log: losses by step, each with its running mean; the gradients' norm and the learning rate."""
    log = record["log"]
    axes = _axes(figure, 121, "Losses", "step", "nats a token")
    names = [name for name in _LOSSES if any(name in entry for entry in log)]
    for i, name in enumerate(names):
        found = [(entry["step"], entry[name]) for entry in log if name in entry]
        at, values = [step for step, _ in found], [value for _, value in found]
        if name == "valid_loss" or len(values) < 20:
            axes.plot(at, values, color=COLOURS[i], marker=MARKS[i], markersize=4, label=name.replace("_", " "))
            continue
        axes.plot(at, values, color=COLOURS[i], alpha=0.3, linewidth=0.8)
        axes.plot(at, _running(values, max(2, len(values) // 20)), color=COLOURS[i], label=name.replace("_", " "))
    axes.legend(fontsize=8)
    norms = _axes(figure, 122, "Gradients and learning rate", "step", "gradients' norm")
    steps = [entry["step"] for entry in log]
    [line] = norms.plot(steps, [entry["grad_norm"] for entry in log], color=COLOURS[4], linewidth=1, label="norm")
    norms.set_ylim(bottom=0)
    rates = norms.twinx()
    rates.spines["right"].set_visible(True)
    rates.set_ylabel("learning rate")
    [other] = rates.plot(
        steps, [entry["learning_rate"] for entry in log], color=COLOURS[5], linestyle="--", label="rate"
    )
    rates.set_ylim(bottom=0)
    norms.legend(handles=[line, other], fontsize=8, loc="upper right")


def _running(values: list[float], count: int) -> list[float]:
    """Mean of each value and up to `count - 1` before it."""
    return [sum(part) / len(part) for part in (values[max(0, i + 1 - count) : i + 1] for i in range(len(values)))]


def calibration(figure: Any, record: Mapping[str, Any]) -> None:
    """Ranges of the inputs of linears by layer, and how the values of the widest one spread, with its clips."""
    axes = _axes(figure, 121, "Inputs of linears: largest |x|, rms (dotted)", "layer", "|x|")
    places: dict[str, list[tuple[int, float, float]]] = {}
    for entry in record["inputs"]:
        _, _, layer, place = entry["name"].split(".", 3)
        places.setdefault(place, []).append((int(layer), max(-entry["min"], entry["max"]), entry["rms"]))
    for i, (place, points) in enumerate(places.items()):
        layers, tops, rms = zip(*points, strict=True)
        axes.plot(layers, tops, color=COLOURS[i], marker=MARKS[i], label=place)
        axes.plot(layers, rms, color=COLOURS[i], marker=MARKS[i], linestyle=":", markersize=3)
    axes.set_yscale("log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside lower left", ncols=4)
    widest = max(record["inputs"], key=lambda e: max(-e["min"], e["max"]) / max(e["rms"], 1e-30))
    spread = _axes(figure, 122, f"Values of {widest['name']}'s input", "|x|", "share of values in a bin")
    held = widest["histogram"]
    half, width = held["bins"] // 2, 2.0 ** held["exponent"] / (held["bins"] // 2)
    edges = [i * width for i in range(0, half + 1, _BINS)]
    shares = [0.0] * (half // _BINS)
    for i, count in enumerate(held["counts"], held["first"]):
        at = i - half if i >= half else half - 1 - i
        shares[at // _BINS] += count / held["count"]
    spread.stairs(shares, edges, color=COLOURS[0], fill=True, alpha=0.6)
    spread.set_yscale("log")
    for i, (method, clip) in enumerate(widest["clips"].items()):
        spread.axvline(clip, color=COLOURS[i + 1], linestyle=("-", "--", "-.", ":")[i], label=f"{method} {clip:.3g}")
    spread.set_xlim(0, 1.05 * max(widest["clips"].values()))
    spread.legend(fontsize=8)


DRAWERS: dict[str, Callable[[Any, Mapping[str, Any]], None]] = {
    "profile": roofline, "scaling": scaling, "memory": timeline, "tracker": owners,
    "calibration": calibration, "train": training, "qat": training, "lora": training,
}  # fmt: skip
