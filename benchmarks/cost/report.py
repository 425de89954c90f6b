"""The counts and predictions as records and as tables. Every table says that it is a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.cost import texts
from benchmarks.cost.ir import Function, UnknownTextError
from benchmarks.cost.subjects import K, Subject
from benchmarks.cost.weigh import CYCLES, LOAD_BYTES_A_CYCLE, Counted, count
from bitnet_mlx.backends.kernels.chips import CHIPS, LANES, Chip
from bitnet_mlx.backends.kernels.layout import LANES as SIMD

LABEL = "a model, not a measurement"
BYTES = 1e9  # chips give bandwidth in GB/s and clocks in GHz


@dataclass(frozen=True)
class Cost:
    """One subject's counts: a pass of its inner loop, and all that stands in no loop."""

    subject: Subject
    loop: Counted
    outside: Counted

    @property
    def cycles(self) -> float:
        """Weighed arithmetic of the inner loop: cycles of a lane, for one weight and all rows of activations."""
        return self.loop.cycles / self.subject.weights

    @property
    def whole(self) -> float | None:
        """The same with what stands outside of the loop and with idle lanes, for rows of K = 2560."""
        if self.subject.tail:
            return None
        passes = -(-K // (self.subject.along * SIMD))
        return SIMD * (passes * self.loop.cycles + self.outside.cycles) / (K * self.subject.rows)

    @property
    def loaded(self) -> float:
        """Bytes that the loop loads for a weight, activations and scales included; most of them come from a cache."""
        return self.loop["loaded bytes"] / self.subject.weights

    @property
    def load_cycles(self) -> float:
        """Cycles that a core's load path needs for them, beside the arithmetic."""
        return self.loaded / LOAD_BYTES_A_CYCLE

    def on(self, chip: Chip) -> Prediction:
        """What bounds it there."""
        memory = chip.cores * LANES * chip.clock * self.subject.bytes / chip.bandwidth
        needs = {"memory": memory, "arithmetic": self.cycles, "loads": self.load_cycles}
        bound = max(needs, key=lambda need: needs[need])
        return Prediction(bound, memory / needs[bound], chip.cores * LANES * chip.clock / needs[bound])


@dataclass(frozen=True)
class Prediction:
    """bound: "memory", "arithmetic" or "loads". share: of nominal bandwidth. speed: 1e9 weights a second."""

    bound: str
    share: float
    speed: float


def measure(subject: Subject) -> Cost:
    """Compile and count. Raises UnknownTextError where the loop is not the expected one or has an unknown instruction."""
    return measure_text(subject, subject.text())


def measure_text(subject: Subject, text: texts.Text) -> Cost:
    """The same of another text, as an edited one."""
    function = Function(texts.ir(text), text.symbol)
    loop = max((count(loop) for loop in function.loops()), key=_products, default=Counted())
    expected = subject.weights * subject.m
    if _products(loop) < expected:
        raise UnknownTextError(
            f"[cost] {subject.name}: the largest inner loop has {_products(loop)} float products; {expected} were expected"
        )
    return Cost(subject, loop, count(function.outside()))


def _products(counted: Counted) -> int:
    return counted["fma"] + counted["float add or multiply"]


def records(costs: Iterable[Cost]) -> list[dict[str, Any]]:
    """One JSON record a subject."""
    return [
        {
            "what": LABEL,
            "name": cost.subject.name,
            "rows_of_activations": cost.subject.m,
            "cycles_per_weight": round(cost.cycles, 4),
            "cycles_per_weight_with_all_outside_the_loop_at_k_2560": cost.whole and round(cost.whole, 4),
            "memory_bytes_per_weight": round(cost.subject.bytes, 5),
            "loaded_bytes_per_weight": round(cost.loaded, 4),
            "load_cycles_per_weight": round(cost.load_cycles, 4),
            "per_weight": {kind: round(n / cost.subject.weights, 4) for kind, n in sorted(cost.loop.items())},
            "chips": [
                {
                    "chip": chip.name,
                    "cores": chip.cores,
                    "bound": there.bound,
                    "predicted_share_of_bandwidth": round(there.share, 3),
                    "predicted_gweights_per_s": round(there.speed, 1),
                }
                for chip in CHIPS
                for there in [cost.on(chip)]
            ],
        }
        for cost in costs
    ]


COLUMNS = {
    "bits": ("bitwise",),
    "add": ("integer add", "64-bit add"),
    "shift": ("shift or extract", "shift by a value"),
    "convert": ("int-float conversion", "bfloat widening"),
    "float": ("fma", "float add or multiply"),
}


def loop_table(costs: Iterable[Cost]) -> list[str]:
    """Cycles a weight, by kind of operation."""
    lines = [
        f"Inner loops, for each weight, in cycles of a lane: {LABEL}",
        f"{'':32} {'M':>2} {'cycles':>7} {'whole':>6}  of them " + " ".join(f"{name:>7}" for name in (*COLUMNS, "other"))
        + f"  {'memory B':>8} {'loaded B':>8} {'load cycles':>11}",
    ]  # fmt: skip
    for cost in costs:
        weighed = {kind: CYCLES[kind] * n / cost.subject.weights for kind, n in cost.loop.items() if kind in CYCLES}
        parts = [sum(weighed.pop(kind, 0) for kind in kinds) for kinds in COLUMNS.values()]
        numbers = " ".join(f"{part:7.3f}" for part in (*parts, sum(weighed.values())))
        whole = f"{cost.whole:.2f}" if cost.whole else "-"
        lines.append(
            f"{cost.subject.name:32} {cost.subject.m:2} {cost.cycles:7.2f} {whole:>6}          {numbers}"
            f"  {cost.subject.bytes:8.3f} {cost.loaded:8.3f} {cost.load_cycles:11.2f}"
        )
    lines += [
        "M: rows of activations. whole: with all that stands outside of the loop, and idle lanes, at K = 2560.",
        "loaded B: bytes that loads ask for, most of them from a cache; load cycles: at 64 bytes a cycle and core.",
    ]
    return lines


def chip_table(costs: Iterable[Cost]) -> list[str]:
    """For each chip and subject: predicted share of bandwidth, what bounds it, 1e9 weights a second."""
    costs = list(costs)
    lines = [
        f"Predicted share of nominal bandwidth, what bounds it, 1e9 weights a second: {LABEL}",
        f"{'':24}" + "".join(f"  {cost.subject.name:>26}" for cost in costs),
    ]
    for chip in CHIPS:
        cells = []
        for cost in costs:
            there = cost.on(chip)
            cells.append(f"  {there.share:6.0%} {there.bound:>10} {there.speed:8.0f}")
        lines.append(f"{chip.name:15} {chip.cores:2} cores" + "".join(cells))
    lines += [
        "From the inner loops alone, with M1's throughputs (128 lanes a cycle and core) on every chip: newer ones issue more",
        "at once. Cores and bandwidths are Apple's, clocks those that benchmarks by others report; see kernels/chips.py.",
    ]
    return lines
