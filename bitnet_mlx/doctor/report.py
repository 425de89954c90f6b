"""What doctor found, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Machine:
    """chip: what MLX computes on, or the processor. bandwidth: of a copy on it, GB/s, measured; nominal: published.
    keeps_float32: whether MLX's float32 products take their inputs whole; None without a GPU. emulates_bfloat16: whether the
    GPU has no bfloat16 of its own.
    """

    system: str
    machine: str
    chip: str
    gpu_cores: int | None = None
    memory_bytes: int | None = None
    bandwidth: float | None = None
    nominal_bandwidth: float | None = None
    mlx_from: str | None = None
    keeps_float32: bool | None = None
    emulates_bfloat16: bool | None = None


@dataclass
class EngineReport:
    """One engine here. exact: logits equal the reference's bits. worst: largest difference over the logits' spread."""

    name: str
    available: bool
    reason: str | None = None
    exact: bool | None = None
    worst: float | None = None
    same_tokens: bool | None = None
    ok: bool = True
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class ProductReport:
    """One ternary product of M rows with a weight [N, K] on one backend.

    exact: all outputs that were compared equal the reference's. time: microseconds. to_float32, to_bfloat16: time of
    stock MLX over ours. share: of the bandwidth that a copy reaches, by the weight's bytes alone. predicted: the share of
    nominal bandwidth that the cost model allows (a model, not a measurement). kernel: ours, or None for stock MLX.
    """

    backend: str
    n: int
    k: int
    m: int
    exact: bool
    text: str
    time: float | None = None
    to_float32: float | None = None
    to_bfloat16: float | None = None
    share: float | None = None
    predicted: float | None = None
    kernel: str | None = None
    reason: str = ""


@dataclass
class KernelReport:
    """A kernel that works row by row. ties: codes that this chip rounds to the other side of a half."""

    backend: str
    name: str
    sound: bool
    text: str
    ties: int = 0


@dataclass
class SwitchedOff:
    """A kernel of ours that is off on this machine, as found now or at an earlier start. fault: it is wrong or fails."""

    backend: str
    name: str
    reason: str
    fault: bool


@dataclass
class Report:
    """Everything that doctor found. `ok` is False when something that is here is wrong."""

    version: str
    python: str
    machine: Machine
    packages: dict[str, str | None]
    chosen: str
    reason: str
    engines: list[EngineReport]
    products: list[ProductReport] = field(default_factory=list)
    kernels: list[KernelReport] = field(default_factory=list)
    switched_off: list[SwitchedOff] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Every engine, product and kernel is right; a kernel that is merely slow is no fault."""
        return (
            all(engine.ok for engine in self.engines)
            and all(product.exact for product in self.products)
            and all(kernel.sound for kernel in self.kernels)
            and not any(off.fault for off in self.switched_off)
        )

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "ok": self.ok}
