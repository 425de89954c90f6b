"""Throughput and latency of all engines, in turns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitnet_mlx.bench.comparison.engines import Sequences
from bitnet_mlx.bench.samples import Spread, seconds, take_turns
from bitnet_mlx.bench.verdicts import Figures, Verdict, milliseconds, percent
from bitnet_mlx.models.decoder import Decoder

BATCHES = (1, 4)
_STALL = 4.0  # times the median
_STALLS = 0.1  # of all tokens


def throughput(
    engines: Mapping[str, Decoder], auto: str, prompt: list[int], tokens: int, repeats: int
) -> dict[str, Any]:
    """Tokens a second of prompts and of decoding, one sequence and several."""
    found: dict[str, Any] = {name: {"decode": {}} for name in engines}
    for batch in BATCHES:
        sequences = {name: Sequences(decoder, batch, prompt) for name, decoder in engines.items()}

        def decode(one: Sequences) -> float:
            return seconds(lambda: [one.step() for _ in range(tokens)])

        prefills = take_turns({n: lambda s=s: seconds(s.prefill) for n, s in sequences.items()}, repeats)
        decodes = {name: [] for name in sequences}
        for _ in range(repeats):
            for name, one in sequences.items():
                one.prefill()
                decodes[name].append(decode(one))
        for name in engines:
            found[name]["decode"][str(batch)] = _rate(decodes[name], batch * tokens)
            if batch == 1:
                found[name]["prefill"] = _rate(prefills[name], len(prompt))
    return {"auto": auto, "engines": found}


def _rate(samples: list[float], tokens: int) -> dict[str, float]:
    return vars(Spread.of([tokens / s for s in samples]))


def decide_throughput(figures: Figures) -> Verdict:
    """Whether the engine that `auto` takes decodes fastest, or as fast as bands can tell."""
    rates = {name: f["decode"]["1"] for name, f in figures["engines"].items()}
    auto, best = figures["auto"], max(rates, key=lambda name: rates[name]["p50"])
    slower = rates[auto]["p50"] < 0.95 * rates[best]["p50"] and rates[auto]["p80"] < rates[best]["p20"]
    text = ", ".join(f"{name} {rate['p50']:.0f}" for name, rate in rates.items())
    reason = f"auto takes {auto}; tokens/s: {text}"
    return Verdict(not slower, f"{best} is faster than auto" if slower else "auto is fastest", reason)


def latency(engines: Mapping[str, Decoder], prompt: list[int], tokens: int, repeats: int) -> dict[str, Any]:
    """Seconds to the first token, and of each token after it."""
    sequences = {name: Sequences(decoder, 1, prompt) for name, decoder in engines.items()}
    first = take_turns({n: lambda s=s: seconds(s.prefill) for n, s in sequences.items()}, repeats)
    each: dict[str, list[float]] = {name: [] for name in sequences}
    for _ in range(repeats):
        for name, one in sequences.items():
            one.prefill()
            one.step()
            each[name] += [seconds(one.step) for _ in range(tokens)]
    return {
        "engines": {
            name: {"first_token": vars(Spread.of(first[name])), "token": vars(Spread.of(each[name])),
                   "longest": max(each[name]), "stalls": _stalls(each[name])}
            for name in sequences
        }
    }  # fmt: skip


def _stalls(samples: list[float]) -> float:
    """The share of tokens that take several times the usual time; the fifth of lowest is the usual."""
    usual = Spread.of(samples).p20
    return sum(s > _STALL * usual for s in samples) / len(samples)


def decide_latency(figures: Figures) -> Verdict:
    """Whether tokens come evenly."""
    stalls = {name: f["stalls"] for name, f in figures["engines"].items()}
    worst = max(stalls, key=lambda name: stalls[name])
    text = ", ".join(
        f"{name} {milliseconds(f['token']['p50'])} (longest {milliseconds(f['longest'])})"
        for name, f in figures["engines"].items()
    )
    if stalls[worst] > _STALLS:
        return Verdict(
            False, "stalls", f"{worst}: {percent(stalls[worst])} of tokens take over 4 times the usual; {text}"
        )
    return Verdict(True, "even", text)
