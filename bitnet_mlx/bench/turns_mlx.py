"""Times of several contenders, taken in turns in one process, so that the machine's moods fall on all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from bitnet_mlx.backends.kernels.launch import Launch
from bitnet_mlx.backends.kernels.products import Runner
from bitnet_mlx.backends.kernels.source import KernelSource
from bitnet_mlx.backends.mlx_import import mx

EMPTY = KernelSource("empty", "empty.metal", (), ("x",), ("y",))

Call = Callable[[int, "mx.array | None"], mx.array]
"""One call of a contender: its number in the chain, and the result of the call before, which it must wait for."""


@dataclass(frozen=True)
class Time:
    """Microseconds of one call: the median of all chains, their quartiles, the best."""

    median: float
    low: float
    high: float
    best: float

    @classmethod
    def of(cls, samples: list[float]) -> Time:
        low, median, high = statistics.quantiles(samples, n=4)
        return cls(median, low, high, min(samples))


def after(x: mx.array, before: mx.array | None) -> mx.array:
    """x, but only once `before` is there: no copy and no kernel."""
    return x if before is None else mx.depends([x], [before])[0]


def outputs(call: Call, calls: int, chained: bool) -> list[mx.array]:
    """What to evaluate for so many calls, each of which waits for the one before if chained."""
    found: list[mx.array] = []
    for i in range(calls):
        found.append(call(i, found[-1] if found and chained else None))
    return found[-1:] if chained else found


def take_turns(
    contenders: Mapping[str, Call], calls: int, repeats: int, warm: int = 2, chained: bool = True
) -> dict[str, Time]:
    """Microseconds a call of each contender, `repeats` times `calls` calls, chained or together, after `warm` untimed."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warm + repeats):
        for name, seconds in _one_turn(contenders, calls, chained):
            if turn >= warm:
                samples[name].append(seconds / calls * 1e6)
    return {name: Time.of(values) for name, values in samples.items()}


def _one_turn(contenders: Mapping[str, Call], calls: int, chained: bool) -> Iterator[tuple[str, float]]:
    for name, call in contenders.items():
        found = outputs(call, calls, chained)
        mx.synchronize()
        start = time.perf_counter()
        mx.eval(found)
        mx.synchronize()
        yield name, time.perf_counter() - start


def empty_kernel(runner: Runner) -> Time:
    """What a launch costs that does nothing: the floor of every kernel's time through MLX."""
    x = mx.zeros((32,), mx.float32)
    mx.eval(x)

    def call(_: int, before: mx.array | None) -> mx.array:
        launch = Launch(EMPTY, (after(x, before),), (), (32, 1, 1), (32, 1, 1), (((32,), "float32"),))
        return runner(launch)[0]

    return take_turns({"empty": call}, calls=64, repeats=31)["empty"]


def bandwidth(megabytes: int = 512) -> float:
    """Bytes a second of a copy through device memory, read and written bytes counted."""
    source = mx.zeros((megabytes << 18,), mx.uint32)
    mx.eval(source)
    times = take_turns({"copy": lambda _, before: after(source, before) + 1}, calls=4, repeats=7)
    return 2 * source.nbytes / (times["copy"].best * 1e-6)
