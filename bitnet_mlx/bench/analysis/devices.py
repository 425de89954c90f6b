"""One token and one prompt on every engine and device that is here: which is fastest, and whether auto takes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitnet_mlx.bench.comparison.engines import Sequences
from bitnet_mlx.bench.samples import Spread, seconds
from bitnet_mlx.bench.verdicts import Figures, Verdict, milliseconds
from bitnet_mlx.models.decoder import Decoder


def devices(engines: Mapping[str, Decoder], auto: str, prompt: list[int], repeats: int) -> dict[str, Any]:
    """Seconds of a prompt and of a token on each, in turns."""
    sequences = {name: Sequences(decoder, 1, prompt) for name, decoder in engines.items()}
    prefill: dict[str, list[float]] = {name: [] for name in engines}
    token: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(repeats + 1):
        for name, one in sequences.items():
            took = seconds(one.prefill)
            one.step()
            steps = [seconds(one.step) for _ in range(4)]
            if turn:
                prefill[name].append(took)
                token[name] += steps
    return {
        "auto": auto,
        "engines": {n: {"prefill": vars(Spread.of(prefill[n])), "token": vars(Spread.of(token[n]))} for n in engines},
    }


def decide_devices(figures: Figures) -> Verdict:
    """Whether what auto takes is fastest at both, as far as bands can tell."""
    auto, engines, better = figures["auto"], figures["engines"], []
    for kind in ("prefill", "token"):
        best = min(engines, key=lambda name: engines[name][kind]["p50"])
        ours, theirs = engines[auto][kind], engines[best][kind]
        if ours["p50"] > 1.05 * theirs["p50"] and ours["p20"] > theirs["p80"]:
            better.append(f"{best} at a {'prompt' if kind == 'prefill' else 'token'}")
    text = ", ".join(
        f"{n} {milliseconds(f['prefill']['p50'])} and {milliseconds(f['token']['p50'])}" for n, f in engines.items()
    )
    reason = f"auto takes {auto}; a prompt and a token take: {text}"
    return Verdict(not better, f"faster than auto: {', '.join(better)}" if better else "auto is fastest", reason)
