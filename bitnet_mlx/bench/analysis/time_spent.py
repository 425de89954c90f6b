"""Where a token's time goes: the part with the most to gain, and what the token waits for."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from bitnet_mlx.bench.comparison.engines import Sequences
from bitnet_mlx.bench.copying import cpu_threads
from bitnet_mlx.bench.profiled import replay
from bitnet_mlx.bench.verdicts import Figures, Verdict, milliseconds, percent
from bitnet_mlx.models.decoder import Decoder

_HOST = 0.3  # of a token
_MEMORY = 0.6  # of a copy's bandwidth
_BUSY = 0.6  # of the threads
_GAIN = 0.25


def parts(decoder: Decoder, prompt: list[int], tokens: int, copy: float) -> dict[str, Any]:
    """A profile's parts of a token, and how busy the process keeps its cores in a prompt and in a token."""
    profile = replay(decoder, prompt, [(3 * i + 1) % decoder.config.vocab_size for i in range(tokens + 1)], copy=copy)
    one = Sequences(decoder, 1, prompt)
    busy = {"prefill_busy": cores_busy(one.prefill), "decode_busy": cores_busy(one.step)}
    found = {name: vars(part) for name, part in profile.parts().items()}
    moved = sum(part["bytes"] for part in found.values())
    return {
        "parts": found, "token_s": profile.token_s, "parts_over_plain": profile.coverage, "copy_bandwidth": copy,
        "of_copy": moved / profile.token_s / copy, "threads": cpu_threads(decoder.name), "cores": os.cpu_count(), **busy,
    }  # fmt: skip


def cores_busy(call: Callable[[], Any], least_s: float = 0.1) -> float:
    """Seconds of processor time for each second of time, over calls that take `least_s` together at least.

    One thread reaches 1 at most, however busy the machine is; that makes a lost thread show.
    """
    start, used = time.perf_counter(), time.process_time()
    while time.perf_counter() - start < least_s:
        call()
    return (time.process_time() - used) / (time.perf_counter() - start)


def floors(figures: Figures) -> dict[str, float]:
    """The share of a token that each part could give back if it ran at the speed of a copy, or not at all."""
    copy = figures["copy_bandwidth"]
    whole = sum(part["seconds"] for part in figures["parts"].values())
    return {name: max(0.0, p["seconds"] - p["bytes"] / copy) / whole for name, p in figures["parts"].items()}


def decide_optimisation(figures: Figures) -> Verdict:
    """The part with the most to gain."""
    gains = floors(figures)
    best = max(gains, key=lambda name: gains[name])
    order = sorted(gains, key=lambda name: -gains[name])[:3]
    reason = "at a copy's speed a token would save " + ", ".join(f"{percent(gains[n])} in {n}" for n in order)
    return Verdict(gains[best] < _GAIN, f"look at {best}", reason)


def decide_bottleneck(figures: Figures) -> Verdict:
    """What a token waits for: the host around the engine, memory, threads that are not there, or arithmetic."""
    parts, threads = figures["parts"], figures["threads"]
    whole = sum(part["seconds"] for part in parts.values())
    host = sum(parts[name]["seconds"] for name in ("host", "sampling", "embedding") if name in parts) / whole
    text = (
        f"a token takes {milliseconds(figures['token_s'])}: {percent(host)} outside the layers and the head, "
        f"{percent(figures['of_copy'])} of a copy's bandwidth, {figures['decode_busy']:.1f} of {threads} threads busy"
    )
    if host > _HOST:
        return Verdict(False, "host", text)
    if figures["of_copy"] >= _MEMORY:
        return Verdict(True, "memory", text)
    if threads > 1 and figures["decode_busy"] < _BUSY * threads:
        return Verdict(False, "threads", text)
    return Verdict(True, "arithmetic", text)
