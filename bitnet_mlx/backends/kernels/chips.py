"""Published figures of Apple's M chips, for predictions only: nothing here was measured by us.

Bandwidth and cores are Apple's (technical specifications of the Macs); clocks are those that philipturner/metal-benchmarks
and GPU databases report, good to a tenth. A chip sold with several numbers of cores stands once for each.
"""

from __future__ import annotations

from typing import NamedTuple


class Chip(NamedTuple):
    """name: as Metal gives it. cores: of the GPU. clock: GHz. bandwidth: of memory, nominal, GB/s."""

    name: str
    cores: int
    clock: float
    bandwidth: float


LANES = 128  # that a core issues in a cycle, M1 to M4

CHIPS = (
    Chip("Apple M1", 7, 1.278, 68),
    Chip("Apple M1", 8, 1.278, 68),
    Chip("Apple M1 Pro", 14, 1.296, 200),
    Chip("Apple M1 Pro", 16, 1.296, 200),
    Chip("Apple M1 Max", 24, 1.296, 400),
    Chip("Apple M1 Max", 32, 1.296, 400),
    Chip("Apple M1 Ultra", 48, 1.296, 800),
    Chip("Apple M1 Ultra", 64, 1.296, 800),
    Chip("Apple M2", 8, 1.398, 100),
    Chip("Apple M2", 10, 1.398, 100),
    Chip("Apple M2 Pro", 16, 1.398, 200),
    Chip("Apple M2 Pro", 19, 1.398, 200),
    Chip("Apple M2 Max", 30, 1.398, 400),
    Chip("Apple M2 Max", 38, 1.398, 400),
    Chip("Apple M2 Ultra", 60, 1.398, 800),
    Chip("Apple M2 Ultra", 76, 1.398, 800),
    Chip("Apple M3", 8, 1.6, 100),
    Chip("Apple M3", 10, 1.6, 100),
    Chip("Apple M3 Pro", 14, 1.6, 150),
    Chip("Apple M3 Pro", 18, 1.6, 150),
    Chip("Apple M3 Max", 30, 1.6, 300),
    Chip("Apple M3 Max", 40, 1.6, 400),
    Chip("Apple M3 Ultra", 60, 1.6, 819),
    Chip("Apple M3 Ultra", 80, 1.6, 819),
    Chip("Apple M4", 8, 1.47, 120),
    Chip("Apple M4", 10, 1.47, 120),
    Chip("Apple M4 Pro", 16, 1.578, 273),
    Chip("Apple M4 Pro", 20, 1.578, 273),
    Chip("Apple M4 Max", 32, 1.578, 410),
    Chip("Apple M4 Max", 40, 1.578, 546),
    Chip("Apple M5", 8, 1.6, 153),
    Chip("Apple M5", 10, 1.6, 153),
    Chip("Apple M5 Pro", 16, 1.6, 307),
    Chip("Apple M5 Pro", 20, 1.6, 307),
    Chip("Apple M5 Max", 32, 1.6, 460),
    Chip("Apple M5 Max", 40, 1.6, 614),
)


# Cycles a weight that the cost model (scripts/metal_cost) gives the mat-vec with four rows a simdgroup, all that stands outside
# of its loop included, at K = 2560.
MATVEC_CYCLES = 2.33


def find(name: str, cores: int | None = None) -> Chip | None:
    """The chip of that name; the one with the most cores where `cores` is not known. None for a chip not listed."""
    named = [chip for chip in CHIPS if chip.name == name]
    exact = [chip for chip in named if chip.cores == cores]
    return (exact or named or [None])[-1]


def cycles_in_step(chip: Chip, bytes_per_weight: float = 0.25) -> float:
    """Cycles a lane has for each weight before arithmetic, not memory, bounds a mat-vec on this chip."""
    return chip.cores * LANES * chip.clock * bytes_per_weight / chip.bandwidth


def predicted_share(chip: Chip, cycles_per_weight: float, bytes_per_weight: float = 0.25) -> float:
    """Share of nominal bandwidth, at most 1, that a loop of so many cycles a weight allows. A model, no measurement."""
    return min(1.0, cycles_in_step(chip, bytes_per_weight) / cycles_per_weight)
