"""An evaluation as text."""

from __future__ import annotations

from typing import Any

from bitnet_mlx.quality import tasks

_LINES = (
    ("perplexity", "perplexity", ".4f"), ("bits_per_byte", "bits a byte", ".4f"),
    ("nats_per_token", "nats a token", ".4f"), ("teacher_perplexity", "teacher's perplexity", ".4f"),
    ("teacher_bits_per_byte", "teacher's bits a byte", ".4f"), ("kl", "KL from the teacher, nats a token", ".4f"),
    ("top1_agreement", "best token is the teacher's", ".2%"),
)  # fmt: skip
_OUTPUTS = (
    ("mse", "MSE", ".3e"), ("sqnr_db", "SQNR dB", ".2f"), ("cosine", "cosine", ".4f"),
    ("running_sqnr_db", "running dB", ".2f"), ("running_cosine", "running", ".4f"), ("input_zeros", "codes 0", ".1%"),
)  # fmt: skip
_COLUMNS = (
    ("zeros", "zeros", ".1%"),
    ("mse", "MSE", ".3e"),
    ("sqnr_db", "SQNR dB", ".2f"),
    ("cosine", "cosine", ".4f"),
)


def _shown(value: float, form: str) -> str:
    """A number in its form; one of very many digits, such as a broken model's perplexity, by its power of ten."""
    return f"{value:{form if abs(value) < 1e9 else '.3e'}}"


def table(record: dict[str, Any]) -> str:
    """Lines of `evaluate`'s record, for a terminal."""
    against = f" against {record['teacher']}" if record["teacher"] else ""
    lines = [f"{record['model']} on {record['backend']}{against}"]
    if "tokens" in record:
        lines[0] += (
            f": {record['tokens']} tokens, {record['bytes']} bytes, windows of {record['length']} moved by {record['stride']}"
        )
    lines += [f"  {text:<34} {_shown(record[name], form)}" for name, text, form in _LINES if name in record]
    if "linears" in record:
        lines += ["", *_linears(record["linears"])]
    if "outputs" in record:
        lines += ["", *_outputs(record["outputs"])]
    if "sensitivity" in record:
        lines += ["", "  what the loss falls by when this layer alone is the teacher's, nats a token"]
        lines += [f"  layer {entry['layer']:<4} {entry['nats_per_token']:+.4f}" for entry in record["sensitivity"]]
    if "tasks" in record:
        lines += ["", *tasks.table(record["tasks"])]
    return "\n".join(lines)


def _outputs(record: dict[str, Any]) -> list[str]:
    head = f"  outputs against the teacher's, {record['tokens']} tokens: on its inputs, and in the running model"
    return [head, *_linears(record["linears"], _OUTPUTS), "", *_linears(record["layers"], _OUTPUTS)]


def _linears(entries: list[dict[str, Any]], columns: tuple[tuple[str, str, str], ...] = _COLUMNS) -> list[str]:
    used = [column for column in columns if any(entry.get(column[0]) is not None for entry in entries)]
    width = max(len(entry["name"]) for entry in entries)
    lines = ["  " + " " * width + "".join(f"{title:>11}" for _, title, _ in used)]
    for entry in entries:
        cells = ["" if entry.get(key) is None else format(entry[key], form) for key, _, form in used]
        lines.append(f"  {entry['name']:<{width}}" + "".join(f"{cell:>11}" for cell in cells))
    return lines
