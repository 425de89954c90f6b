"""The record of `bench backends`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from bitnet_mlx.bench.comparison import equality, footprint, speed
from bitnet_mlx.bench.comparison.engines import Make, auto, made, maker, present, prompt_ids
from bitnet_mlx.bench.copying import machine_copy
from bitnet_mlx.bench.decode import DecodeOptions, check, subject_weights
from bitnet_mlx.bench.stamp import stamp
from bitnet_mlx.bench.verdicts import Decide, judged
from bitnet_mlx.profile.html import Record

DECIDE: dict[str, Decide] = {
    "throughput": speed.decide_throughput, "latency": speed.decide_latency, "transfer": footprint.decide_transfer,
    "initialisation": footprint.decide_initialisation, "memory": footprint.decide_memory,
    "equality": equality.decide_equality,
}  # fmt: skip


def measure(options: DecodeOptions) -> Record:
    """All six parts over every backend that runs here. Raises ConfigError for options that cannot be."""
    check(options)
    weights = subject_weights(options)
    make = maker(weights, options.dtype, options.threads)
    found = compare(present(), auto(), make, weights.nbytes, weights.config.vocab_size, options)
    return Record(
        {
            "bench": "backends",
            **asdict(options),
            "backend": auto(),
            "weight_bytes": weights.nbytes,
            **found,
            **stamp(auto()),
        }
    )


def compare(
    names: list[str], chosen: str, make: Make, weight_bytes: int, vocabulary: int, options: DecodeOptions,
    parts: tuple[str, ...] = tuple(DECIDE), processes: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """The parts that are asked for, each with its verdict. chosen: what auto takes."""
    prompt = prompt_ids(options.prompt, vocabulary)
    short = prompt[:8]
    engines = made(names, make)
    tokens, repeats = options.tokens, options.repeats
    measured = {
        "throughput": lambda: speed.throughput(engines, chosen, prompt, tokens, repeats),
        "latency": lambda: speed.latency(engines, short, tokens, repeats),
        "transfer": lambda: footprint.transfer(names, make, weight_bytes),
        "initialisation": lambda: footprint.initialisation(names, make, processes),
        "memory": lambda: footprint.memory(names, make, prompt, chosen, weight_bytes),
        "equality": lambda: equality.equality(engines, prompt),
    }
    found: dict[str, Any] = {name: judged(measured[name](), DECIDE[name]) for name in parts}
    if "throughput" in found:
        _ceiling(found["throughput"], weight_bytes)
    return {"names": names, **found}


def _ceiling(throughput: dict[str, Any], weight_bytes: int) -> None:
    """What memory alone would allow: a copy's bytes a second over the weights of a token, and the share reached."""
    for name, rates in throughput["engines"].items():
        copy = machine_copy(name)
        ceiling = copy / weight_bytes
        rates |= {"copy_bandwidth": copy, "ceiling_tps": ceiling, "of_ceiling": rates["decode"]["1"]["p50"] / ceiling}


def lines(record: Mapping[str, Any]) -> Iterator[str]:
    """The record for people."""
    what = record["model"] or f"random weights, preset {record['preset']}"
    yield f"{what}, {record['weight_bytes'] / 1e6:.1f} MB; backends here: {', '.join(record['names'])}"
    yield f"  {'':8} {'decode':>9} {'4 at once':>10} {'prompt':>9} tokens/s   {'token':>9} {'of copy':>8}"
    for name, f in record["throughput"]["engines"].items():
        token = record["latency"]["engines"][name]["token"]["p50"] * 1e3
        yield (
            f"  {name:8} {f['decode']['1']['p50']:9.0f} {f['decode']['4']['p50']:10.0f} {f['prefill']['p50']:9.0f}"
            f"            {token:7.2f} ms {f['of_ceiling']:7.0%}"
        )
    for part in DECIDE:
        yield f"{part}: {record[part]['verdict']} ({record[part]['reason']})"
