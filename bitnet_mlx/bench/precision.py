"""What each precision preset costs and gives on an engine: bytes, speed and bits per byte of a text, side by side."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_mlx.api import embedded_model, load
from bitnet_mlx.backends import choose
from bitnet_mlx.bench.decode import StepContender
from bitnet_mlx.bench.memory import predict
from bitnet_mlx.checkpoint.hub import resolve
from bitnet_mlx.errors import ConfigError
from bitnet_mlx.memory.show import size, text_table
from bitnet_mlx.models.owners import holdings
from bitnet_mlx.models.precision import PRESETS, for_engine
from bitnet_mlx.quality.bits import bits_per_byte, total_nats

_TEXT = "ternary.py"  # of this package, where no text is given
_LONGEST = 1024  # tokens of a window


def measure(
    backend: str = "auto",
    model: str | None = None,
    text: str | None = None,
    tokens: int = 32,
    scored: int = 1024,
    repeats: int = 3,
) -> dict[str, Any]:
    """The record. text: a file to score, of which the first `scored` tokens count; None takes a file of this package.

    Presets take turns, so that a machine that slows down slows all. Raises ConfigError for numbers or files that cannot be.
    """
    for name, value, least in (("tokens", tokens, 1), ("scored", scored, 2), ("repeats", repeats, 1)):
        if value < least:
            raise ConfigError(f"[bench] {name} is {value}; it must be at least {least}")
    engine = choose(backend).name
    folder = embedded_model() if model is None else resolve(model, None)
    content = _text(text)
    found: dict[str, dict[str, Any]] = {}
    contenders: dict[str, StepContender] = {}
    for name, wanted in PRESETS.items():
        loaded, tokenizer = load(folder, backend=engine, precision=name)
        ids = np.asarray(tokenizer.encode(content)[:scored])
        length = min(len(ids) - 1, loaded.config.max_position_embeddings, _LONGEST)
        used, notes = for_engine(wanted, engine)
        plan = predict(folder, "", engine, length, precision=name)
        held, cache = holdings(loaded), loaded.make_cache(length)
        loaded.step([ids[:length].tolist()], [cache])
        nats = total_nats(loaded, ids, length, max(length // 2, 1))
        found[name] = {
            "policy": used.record(), "table": used.table(), "notes": list(notes), "weight_bytes": held["weights"],
            "head_bytes": held["head"], "kv_bytes": cache.nbytes, "predicted_kv_bytes": plan.kv_cache,
            "bits_per_byte": bits_per_byte(nats, len(tokenizer.decode(ids[1:].tolist()).encode())),
        }  # fmt: skip
        contenders[name] = StepContender(loaded)
    for name, seconds in _speeds(contenders, ids[: length // 2].tolist(), tokens, repeats).items():
        found[name]["decode_ms"] = seconds * 1e3
    return {"bench": "precision", "model": model or "embedded", "backend": engine, "positions": length,
            "scored_tokens": len(ids) - 1, "presets": found}  # fmt: skip


def _speeds(contenders: dict[str, StepContender], prompt: list[int], tokens: int, repeats: int) -> dict[str, float]:
    """Median seconds of a token, the first turn left out: it compiles and warms up."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, contender in contenders.items():
            contender.prefill(prompt)
            seconds = contender.decode(tokens)
            if turn:
                samples[name].append(seconds)
    return {name: statistics.median(taken) for name, taken in samples.items()}


def _text(path: str | None) -> str:
    where = Path(str(files("bitnet_mlx") / _TEXT)) if path is None else Path(path)
    try:
        return where.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"[bench] {where} cannot be read as UTF-8 text: {error}") from error


def lines(record: dict[str, Any]) -> Iterator[str]:
    """For people: the policies, then what they cost and give."""
    presets = record["presets"]
    yield f"{record['model']} on {record['backend']}, {record['positions']} positions in the cache"
    rows = {name: preset["table"] for name, preset in presets.items()}
    first = next(iter(rows.values()))
    yield text_table(["", *rows], [[row, *(table[row] for table in rows.values())] for row in first])
    yield ""
    shown = [
        ["weights", *(size(p["weight_bytes"]) for p in presets.values())],
        ["embedding and head", *(size(p["head_bytes"]) for p in presets.values())],
        ["KV cache", *(size(p["kv_bytes"]) for p in presets.values())],
        ["a token", *(f"{p['decode_ms']:.2f} ms" for p in presets.values())],
        ["bits per byte", *(f"{p['bits_per_byte']:.4f}" for p in presets.values())],
    ]
    yield text_table(["", *presets], shown)
    yield from sorted({note for preset in presets.values() for note in preset["notes"]})
