"""What a model will take before it is loaded, whether that fits, and which limits to give MLX: arithmetic alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from bitnet_mlx.errors import ConfigError
from bitnet_mlx.memory.show import html_table, size, text_table

GIB = 1 << 30
_STEP = 64 << 20  # limits are rounded up to this
_LEAST_RESERVE, _MOST_RESERVE = 2 * GIB, 16 * GIB  # what the system and other programs keep
_SMALL_MAC = 36 * GIB  # up to here macOS lets a GPU hold two thirds of memory, above it three quarters
_MOST_CONTEXT, _MOST_BATCH = 1 << 24, 4096  # beyond any model's, and counted pass by pass
_NEEDED = ("weights", "head", "kv_cache", "activations")


@dataclass(frozen=True)
class Demand:
    """What one model takes on one engine, in bytes. kv and activations: functions of (context, batch) that never fall.

    process: the interpreter and its libraries. load_extra: held beside the rest while the model is loaded. longest: the
    model's own context. measured: whether predictions on this engine have been held against a run.
    """

    model: str
    engine: str
    weights: int
    head: int
    kv: Callable[[int, int], int]
    activations: Callable[[int, int], int]
    process: int
    load_extra: int
    longest: int
    measured: bool

    def needed(self, context: int, batch: int) -> int:
        """All of it at its highest: while text is made, or while the model is loaded."""
        fixed = self.weights + self.head
        return self.process + fixed + max(self.kv(context, batch) + self.activations(context, batch), self.load_extra)


@dataclass(frozen=True)
class Machine:
    """total, available: bytes of memory; None is unknown. working_set: what a GPU may hold, where it is known."""

    total: int | None
    available: int | None = None
    working_set: int | None = None


@dataclass(frozen=True)
class MlxLimits:
    """What to give MLX's set_memory_limit, set_cache_limit and set_wired_limit; None where it does not apply."""

    memory: int
    cache: int
    wired: int | None


@dataclass(frozen=True)
class Plan:
    """A prediction in bytes. total: weights, head, kv_cache and activations together, which is what a run is held against.

    needed: with the process, and the peak of loading where that is higher. budget: what this machine can give; None where
    its memory is unknown. fits_now: with what is free at this moment. longest_context: the longest that fits, 0 if none.
    """

    model: str
    engine: str
    context: int
    batch: int
    weights: int
    head: int
    kv_cache: int
    activations: int
    total: int
    process: int
    needed: int
    budget: int | None
    machine: Machine
    fits: bool | None
    fits_now: bool | None
    longest_context: int | None
    model_context: int
    mlx_limits: MlxLimits | None
    measured: bool

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def table(self) -> str:
        """For people."""
        return "\n".join([self._title(), text_table(["", "bytes", ""], self._rows()), *self._verdict()])

    def _repr_html_(self) -> str:
        rest = "".join(f"<p>{line}</p>" for line in self._verdict())
        from html import escape

        return f"<div>{html_table(['', 'bytes', ''], self._rows(), escape(self._title()))}{rest}</div>"

    def _title(self) -> str:
        return f"{self.model} on {self.engine}, {self.batch} x {self.context} positions"

    def _rows(self) -> list[list[str]]:
        names = (*_NEEDED, "total", "process", "needed")
        rows = [[name.replace("_", " "), str(getattr(self, name)), size(getattr(self, name))] for name in names]
        if self.budget is not None:
            rows.append(["this machine", str(self.budget), size(self.budget)])
        return rows

    def _verdict(self) -> list[str]:
        lines = []
        if self.context > self.model_context:
            lines.append(f"The model itself takes at most {self.model_context} positions.")
        if self.fits is None:
            lines.append("How much memory this machine has is not known.")
        else:
            lines.append("It fits this machine." if self.fits else "It does not fit this machine.")
            if self.fits and self.fits_now is False:
                lines.append(f"Only {size(self.machine.available)} are free now.")
            lines.append(f"Longest context that fits: {self.longest_context} of {self.model_context} positions.")
        if self.mlx_limits is not None:
            limits = self.mlx_limits
            wired = "" if limits.wired is None else f", wired {size(limits.wired)}"
            lines.append(f"Limits for MLX: memory {size(limits.memory)}, cache {size(limits.cache)}{wired}.")
        if not self.measured:
            lines.append(f"On {self.engine} activations are an estimate: no run was held against it yet.")
        return lines


def budget(machine: Machine, engine: str) -> int | None:
    """Bytes that one process should take at most.

    metal: the GPU's working set, by MLX or by macOS' own rule. cuda: its memory. Elsewhere all but an eighth, which is
    at least 2 and at most 16 GiB.
    """
    if machine.working_set is not None and engine in ("metal", "cuda"):
        return machine.working_set
    if machine.total is None:
        return None
    if engine == "metal":
        return machine.total * 2 // 3 if machine.total <= _SMALL_MAC else machine.total * 3 // 4
    reserve = min(max(machine.total // 8, _LEAST_RESERVE), _MOST_RESERVE)
    return max(machine.total - reserve, 0)


def make_plan(demand: Demand, machine: Machine, context: int | None = None, batch: int = 1) -> Plan:
    """The prediction for `batch` sequences of `context` positions (None: the model's own context, which `context` may pass:
    the plan then says so).

    Raises ConfigError for a context or batch that cannot be.
    """
    context = demand.longest if context is None else context
    for name, value, most in (("context", context, _MOST_CONTEXT), ("batch", batch, _MOST_BATCH)):
        if not 1 <= value <= most:
            raise ConfigError(f"[memory] {name} is {value}; 1 to {most} is allowed")
    kv, activations = demand.kv(context, batch), demand.activations(context, batch)
    needed, room = demand.needed(context, batch), budget(machine, demand.engine)
    return Plan(
        demand.model, demand.engine, context, batch, demand.weights, demand.head, kv, activations,
        demand.weights + demand.head + kv + activations, demand.process, needed, room, machine,
        None if room is None else needed <= room,
        None if machine.available is None else needed <= machine.available,
        None if room is None else longest_context(demand, room, batch), demand.longest,
        _limits(demand.engine, needed, activations, room), demand.measured,
    )  # fmt: skip


def longest_context(demand: Demand, room: int, batch: int = 1) -> int:
    """The most positions of each of `batch` sequences that `room` bytes hold, at most the model's context; 0 if none."""
    low, high = 0, demand.longest
    while low < high:
        middle = (low + high + 1) // 2
        if demand.needed(middle, batch) <= room:
            low = middle
        else:
            high = middle - 1
    return low


def _limits(engine: str, needed: int, activations: int, room: int | None) -> MlxLimits | None:
    """memory: the machine's budget. wired: what the model needs, rounded up. cache: what activations use again and again,
    and no more than is left."""
    if engine not in ("metal", "cuda", "mlx") or room is None:
        return None
    whole = -(-needed // _STEP) * _STEP
    cache = min(-(-2 * activations // _STEP) * _STEP, max(room - needed, 0))
    return MlxLimits(room, cache, min(whole, room) if engine == "metal" else None)
