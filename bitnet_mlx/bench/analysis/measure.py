"""The record of `bench analysis`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from bitnet_mlx.backends import choose
from bitnet_mlx.bench.analysis import bytes_held, devices, scaling, time_spent
from bitnet_mlx.bench.comparison.engines import made, maker, present, prompt_ids
from bitnet_mlx.bench.copying import machine_copy
from bitnet_mlx.bench.decode import DecodeOptions, check, subject_weights
from bitnet_mlx.bench.regression import Suite, summary
from bitnet_mlx.bench.stamp import stamp
from bitnet_mlx.bench.verdicts import Decide, Figures, Verdict, judged
from bitnet_mlx.profile.html import Record


def decide_regression(figures: Figures) -> Verdict:
    """Of figures that were compared with a baseline; of others there is nothing to decide."""
    if "regressed" not in figures:
        return Verdict(True, "no baseline", "measured; bench regression --compare FILE compares")
    bad = figures["regressed"]
    return Verdict(not bad, f"regressed: {', '.join(bad)}" if bad else "no regression", f"{figures['ratios']}")


DECIDE: dict[str, Decide] = {
    "memory": bytes_held.decide_memory, "regression": decide_regression, "allocation": bytes_held.decide_allocation,
    "optimisation": time_spent.decide_optimisation, "devices": devices.decide_devices,
    "bottleneck": time_spent.decide_bottleneck, "scaling": scaling.decide_scaling,
}  # fmt: skip


def measure(options: DecodeOptions, only: tuple[str, ...] = tuple(DECIDE)) -> Record:
    """The analyses that are asked for, of one backend. Raises ConfigError for options that cannot be."""
    check(options)
    weights = subject_weights(options)
    name = choose(options.backend).name
    make = maker(weights, options.dtype, options.threads)
    decoder = make(name)
    prompt = prompt_ids(options.prompt, weights.config.vocab_size)
    tokens, repeats = options.tokens, options.repeats
    copy = machine_copy(name)
    spent: dict[str, Any] = {}

    def time_parts() -> dict[str, Any]:
        if not spent:
            spent.update(time_spent.parts(decoder, prompt, tokens, copy))
        return spent

    longest = min(weights.config.max_position_embeddings - tokens - 8, 4 * options.prompt)
    measured = {
        "memory": lambda: bytes_held.memory(decoder, prompt, tokens),
        "regression": lambda: {
            "metrics": {n: summary(kinds) for n, kinds in Suite(decoder, options).samples().items()}
        },
        "allocation": lambda: bytes_held.allocation(decoder, prompt, tokens),
        "optimisation": time_parts,
        "devices": lambda: devices.devices(made(present(), make), name, prompt, repeats),
        "bottleneck": time_parts,
        "scaling": lambda: scaling.scaling(decoder, longest, repeats),
    }
    found = {part: judged(measured[part](), DECIDE[part]) for part in only}
    head = {
        "bench": "analysis",
        **asdict(options),
        "backend": name,
        "weight_bytes": weights.nbytes,
        "copy_bandwidth": copy,
    }
    return Record({**head, **found, **stamp(name)})


def lines(record: Mapping[str, Any]) -> Iterator[str]:
    """The record for people."""
    what = record["model"] or f"random weights, preset {record['preset']}"
    yield f"{what}, {record['backend']}; a copy moves {record['copy_bandwidth'] / 1e9:.1f} GB/s"
    for part in DECIDE:
        if part in record:
            mark = " " if record[part]["ok"] else "!"
            yield f"{mark} {part}: {record[part]['verdict']} ({record[part]['reason']})"
