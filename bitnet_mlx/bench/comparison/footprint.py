"""Transfer, initialisation and memory efficiency of all engines."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np

from bitnet_mlx.backends import ON_MLX
from bitnet_mlx.bench.comparison.engines import Make, Sequences
from bitnet_mlx.bench.live_bytes import Meter
from bitnet_mlx.bench.samples import Spread, seconds
from bitnet_mlx.bench.verdicts import Figures, Verdict, megabytes, milliseconds, percent
from bitnet_mlx.errors import BackendError

_SLACK = 1 << 20  # bytes that a decoder may need for itself
_READY = 1.0  # seconds until the first token that nobody minds
_LEAN = 0.5  # of weights and cache
_MOVED = 16 << 20


def transfer(names: list[str], make: Make, weight_bytes: int) -> dict[str, Any]:
    """Bytes that each engine copies to hold the weights, and how fast arrays go to it and come back."""
    found = {}
    for name in names:
        kept: list[Any] = []
        with Meter(name).counting() as meter:
            before = meter.live()
            kept.append(make(name))
            copied = max(0, meter.live() - before)
        found[name] = {"copied_bytes": copied, **_moves(name)}
    return {"weight_bytes": weight_bytes, "engines": found}


def _moves(name: str) -> dict[str, float | None]:
    """Bytes a second into MLX and back; None where an engine computes on numpy's own memory."""
    if name not in ON_MLX:
        return {"in_rate": None, "out_rate": None}
    import mlx.core as mx

    host = np.ones(_MOVED // 4, np.float32)
    there = mx.array(host)
    inward = [seconds(lambda: mx.eval(mx.array(host))) for _ in range(5)]
    outward = [seconds(lambda: np.array(there, copy=True)) for _ in range(5)]
    return {"in_rate": _MOVED / min(inward), "out_rate": _MOVED / min(outward)}


def decide_transfer(figures: Figures) -> Verdict:
    """CPU engines use the weights where they lie; MLX may hold them once, and its heads' biases."""
    weights, bad = figures["weight_bytes"], []
    for name, f in figures["engines"].items():
        allowed = 1.3 * weights + _SLACK if name in ON_MLX else 0.05 * weights + _SLACK
        if f["copied_bytes"] > allowed:
            bad.append(name)
    text = ", ".join(f"{name} {megabytes(f['copied_bytes'])}" for name, f in figures["engines"].items())
    reason = f"held beside {megabytes(weights)} of weights: {text}"
    return Verdict(not bad, f"{', '.join(bad)} copies" if bad else "no needless copy", reason)


def initialisation(names: list[str], make: Make, processes: bool = True) -> dict[str, Any]:
    """Seconds to make a decoder and for its first token, against a steady token; and a whole process to one token."""
    found = {}
    for name in names:
        decoder: list[Any] = []
        made = seconds(lambda name=name, decoder=decoder: decoder.append(make(name)))
        sequence = Sequences(decoder[0], 1, [1])
        first = seconds(sequence.prefill)
        steady = Spread.of([seconds(sequence.step) for _ in range(8)]).p50
        process = seconds(lambda name=name: _one_token(name)) if processes else None
        found[name] = {"make_s": made, "first_s": first, "steady_s": steady, "process_s": process}
    return {"engines": found}


def _one_token(name: str) -> None:
    """A process that loads the embedded model and makes one token. Raises BackendError where it fails."""
    command = [sys.executable, "-m", "bitnet_mlx", "generate", "--prompt", "x", "--max-tokens", "1", "--backend", name]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BackendError(f"[bench] {' '.join(command[2:])} failed: {done.stderr.strip().splitlines()[-1:]}")


def decide_initialisation(figures: Figures) -> Verdict:
    """Whether each engine is ready within a second."""
    late = {n: f["make_s"] + f["first_s"] for n, f in figures["engines"].items() if f["make_s"] + f["first_s"] > _READY}
    text = ", ".join(
        f"{n} {milliseconds(f['make_s'])} + {milliseconds(f['first_s'])}" for n, f in figures["engines"].items()
    )
    return Verdict(not late, f"slow start: {', '.join(late)}" if late else "ready", f"made + first token: {text}")


def memory(names: list[str], make: Make, prompt: list[int], auto: str, weight_bytes: int) -> dict[str, Any]:
    """What a prompt and a token need on top of weights and cache."""
    found = {}
    for name in names:
        decoder = make(name)
        sequence = Sequences(decoder, 1, prompt)
        sequence.prefill()
        sequence.step()
        cache = decoder.make_cache()
        decoder.step([prompt], [cache])
        with Meter(name).counting() as meter:
            prefill, step = meter.transient(sequence.prefill), meter.transient(sequence.step)
        found[name] = {"prefill_bytes": prefill, "step_bytes": step, "cache_bytes": cache.nbytes}
    return {"auto": auto, "weight_bytes": weight_bytes, "engines": found}


def decide_memory(figures: Figures) -> Verdict:
    """Whether the engine that auto takes decodes in little more than its weights and its cache."""
    weights, shares = figures["weight_bytes"], {}
    for name, f in figures["engines"].items():
        shares[name] = f["step_bytes"] / (weights + f["cache_bytes"])
    auto = figures["auto"]
    text = ", ".join(f"{name} {percent(share)}" for name, share in shares.items())
    lean = shares[auto] <= _LEAN
    return Verdict(lean, "lean" if lean else f"{auto} is heavy", f"a token's own need, of weights and cache: {text}")
