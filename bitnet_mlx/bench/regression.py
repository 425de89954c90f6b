"""`bitnet-mlx bench regression`: the same work measured today and in a record, and whether it has become slower.

Other work on the machine must not look like ours. So each sample is kept in three forms: seconds; seconds divided by those
of plain numpy work next to it, which slows down as the machine does; and, where the system tells, seconds less what threads
waited for a core. A metric has regressed only if all of them say so: median worse by 5 % and bands (p20 to p80) apart. What
looks regressed is measured again, four times, and counts only if it does so each time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_mlx.api import make_decoder
from bitnet_mlx.backends import choose
from bitnet_mlx.bench.comparison.engines import Sequences, prompt_ids
from bitnet_mlx.bench.copying import cpu_threads
from bitnet_mlx.bench.decode import DecodeOptions, check, subject_weights
from bitnet_mlx.bench.delays import take
from bitnet_mlx.bench.samples import Spread, seconds
from bitnet_mlx.bench.stamp import stamp
from bitnet_mlx.errors import ConfigError
from bitnet_mlx.models.decoder import Decoder
from bitnet_mlx.profile.html import Record

WORSE = 1.05
AGAIN = 4  # more measurements of what looks regressed: with 2 the same code gave 2 false alarms in 420, with 4 none
SAMPLES = 15
# A baseline is comparable if all of these are equal in both records.
SAME = (
    "bench", "backend", "preset", "model", "layers", "head_bits", "dtype", "prompt", "tokens", "machine", "processor",
    "cores", "threads", "device_name",
)  # fmt: skip
Samples = dict[str, dict[str, list[float]]]


class NoBaselineError(ConfigError):
    """There is nothing to compare with; exit code 2."""


def measure(options: DecodeOptions) -> tuple[Record, Callable[[], Samples]]:
    """The record, and what measures anew. Raises ConfigError for options that cannot be."""
    check(options)
    choice = choose(options.backend)
    weights = subject_weights(options)
    start = time.perf_counter()
    decoder = make_decoder(choice.name, weights, options.dtype, options.threads)
    made = time.perf_counter() - start
    suite = Suite(decoder, options)
    taken = suite.samples()
    record = {
        "bench": "regression", **asdict(options), "backend": choice.name, "weight_bytes": weights.nbytes,
        "make_s": made, "metrics": {name: summary(kinds) for name, kinds in taken.items()}, **stamp(choice.name),
    }  # fmt: skip
    return Record(record), suite.samples


def summary(kinds: Mapping[str, list[float]]) -> dict[str, Any]:
    """A metric's spread in each form, with the samples."""
    return {kind: {**vars(Spread.of(samples)), "samples": samples} for kind, samples in kinds.items()}


class Suite:
    """One decoder's metrics: a prompt, a token, a token of four sequences."""

    def __init__(self, decoder: Decoder, options: DecodeOptions) -> None:
        prompt = prompt_ids(options.prompt, decoder.config.vocab_size)
        self._one, self._four = Sequences(decoder, 1, prompt), Sequences(decoder, 4, prompt[:8])
        self._tokens, self._threads = options.tokens, cpu_threads(decoder.name)
        rng = np.random.default_rng(0)
        self._stream = rng.standard_normal(1 << 20).astype(np.float32)  # 4 MB: past the second level of caches
        self._work = rng.standard_normal((96, 96)).astype(np.float32)

    def samples(self) -> Samples:
        """Seconds of each metric and the same in references, in turns; the first turn warms up and is dropped."""
        found: Samples = {}
        for turn in range(SAMPLES + 1):
            for name, value in self._turn():
                if turn:
                    for kind, sample in value.items():
                        found.setdefault(name, {}).setdefault(kind, []).append(sample)
        return found

    def _turn(self) -> Iterator[tuple[str, dict[str, float]]]:
        count = self._tokens
        yield "prefill", self._beside(self._one.prefill, 1)
        yield "decode", self._beside(self._one.step, count)
        self._four.prefill()
        yield "decode of 4", self._beside(self._four.step, count)

    def _beside(self, call: Callable[[], Any], count: int) -> dict[str, float]:
        """Of one call, in each form; the reference is half of before and half of after."""
        before = self._reference()
        taken = take(lambda: [call() for _ in range(count)])
        reference = (before + self._reference()) / 2
        found = {"seconds": taken.wall / count, "references": taken.wall / count / reference}
        undelayed = taken.undelayed(self._threads)
        return found if undelayed is None else {**found, "undelayed": undelayed / count}

    def _reference(self) -> float:
        return min(seconds(self._plain_work) for _ in range(3))

    def _plain_work(self) -> float:
        return float(self._stream.sum() + self._stream.max() + (self._work * self._work).sum())


def slower(now: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Whether a metric has regressed, by its spreads in every form that both have."""
    return all(
        now[kind]["p50"] >= WORSE * before[kind]["p50"] and now[kind]["p20"] > before[kind]["p80"]
        for kind in now
        if kind in before
    )


def compare(record: Mapping[str, Any], baseline: Mapping[str, Any], again: Callable[[], Samples]) -> dict[str, Any]:
    """Each metric's ratios to the baseline, and which have regressed. again: measures anew."""
    held, metrics = baseline["metrics"], dict(record["metrics"])
    suspects = [name for name in metrics if name in held and slower(metrics[name], held[name])]
    for _ in range(AGAIN):
        if suspects:
            anew = {name: summary(kinds) for name, kinds in again().items()}
            suspects = [name for name in suspects if slower(anew[name], held[name])]
    ratios = {
        name: {
            kind: metrics[name][kind]["p50"] / held[name][kind]["p50"] for kind in metrics[name] if kind in held[name]
        }
        for name in metrics
        if name in held
    }
    return {"baseline_commit": baseline.get("commit"), "baseline_date": baseline.get("date"), "ratios": ratios,
            "regressed": suspects}  # fmt: skip


def find_baseline(path: str | Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """The last comparable record of a file of JSON lines.

    Raises NoBaselineError where the file is missing, is no JSON, or holds no record of the same work on the same machine.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        records = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise NoBaselineError(f"[bench] no baseline in {path}: {error}; write one with --record {path}") from error
    known = [r for r in records if isinstance(r, dict)]
    for found in reversed(known):
        if all(found.get(name) == record.get(name) for name in SAME) and isinstance(found.get("metrics"), dict):
            return found
    nearest = [r for r in known if r.get("bench") == record["bench"]][-1:]
    differs = [
        f"{name} {r.get(name)!r} there, {record.get(name)!r} here"
        for r in nearest
        for name in SAME
        if r.get(name) != record.get(name)
    ]
    raise NoBaselineError(
        f"[bench] {path} has {len(known)} records and none of this work on this machine"
        + (f" (the last differs in {'; '.join(differs)})" if differs else "")
        + f"; write one with --record {path}"
    )


def lines(record: Mapping[str, Any]) -> Iterator[str]:
    """The record for people."""
    what = record["model"] or f"random weights, preset {record['preset']}"
    yield f"{what}, {record['backend']}; medians with p20 to p80 of {SAMPLES} samples, and times a numpy reference"
    ratios = record.get("comparison", {}).get("ratios", {})
    for name, kinds in record["metrics"].items():
        s, r = kinds["seconds"], kinds["references"]
        against = ratios.get(name)
        beside = (
            "" if against is None else "   of the baseline: " + ", ".join(f"{k} {v:.2f}" for k, v in against.items())
        )
        yield f"  {name:12} {s['p50'] * 1e3:9.3f} ms ({s['p20'] * 1e3:.3f} to {s['p80'] * 1e3:.3f}) {r['p50']:8.2f}{beside}"
    if "comparison" in record:
        bad = record["comparison"]["regressed"]
        yield f"REGRESSED: {', '.join(bad)}" if bad else "no regression"
