"""What this machine can run, and whether each engine gives the reference's numbers here.

Each engine runs the embedded model on a short text; the numpy engine is the reference. The cpu engine must give its
logits to the last bit. MLX sums its norms, softmax and head in another order, so its logits must be close, in float32.
"""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from bitnet_mlx import __version__
from bitnet_mlx.backends import choose, missing
from bitnet_mlx.errors import BitnetError

ENGINES = ("numpy", "cpu", "mlx")
PACKAGES = ("mlx", "mlx-lm", "numba", "tbb", "numpy", "tokenizers", "sentencepiece", "huggingface-hub")
TEXT = "def main():\n    return 0\n"
CLOSE = (
    0.3  # of the logits' spread: a flipped code moves them by some percent, a wrong product by several times the spread
)


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
class Report:
    """Everything that doctor found. `ok` is False when an engine that is here is wrong."""

    version: str
    python: str
    system: str
    machine: str
    packages: dict[str, str | None]
    chosen: str
    reason: str
    engines: list[EngineReport]

    @property
    def ok(self) -> bool:
        return all(engine.ok for engine in self.engines)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "ok": self.ok}


def examine() -> Report:
    """Look at this machine and run every engine that is here on the embedded model."""
    choice = choose("auto")
    return Report(
        version=__version__,
        python=platform.python_version(),
        system=platform.platform(),
        machine=platform.machine(),
        packages={name: _version(name) for name in PACKAGES},
        chosen=choice.name,
        reason=choice.reason,
        engines=_engines(),
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _engines() -> list[EngineReport]:
    from bitnet_mlx.api import load

    model, tokenizer = load(backend="numpy")
    ids = tokenizer.encode(TEXT)
    reference = model.step([ids], [model.make_cache()], "all")[0]
    return [EngineReport("numpy", True, exact=True, worst=0.0, same_tokens=True), *(
        _compare(name, ids, reference) for name in ENGINES[1:]
    )]  # fmt: skip


def _compare(name: str, ids: list[int], reference: np.ndarray) -> EngineReport:
    from bitnet_mlx.api import load

    reason = missing(name)
    if reason:
        return EngineReport(name, False, reason)
    try:
        model, _ = load(backend=name, dtype="float32")
        logits = model.step([ids], [model.make_cache()], "all")[0]
    except BitnetError as error:
        return EngineReport(name, True, str(error), ok=False)
    report = EngineReport(name, True, details=_details(name, model))
    report.exact = bool(np.array_equal(logits, reference))
    report.worst = float(np.abs(logits - reference).max() / reference.std())
    report.same_tokens = bool(np.array_equal(logits.argmax(-1), reference.argmax(-1)))
    report.ok = report.exact if name == "cpu" else report.worst <= CLOSE
    return report


def _details(name: str, model: Any) -> dict[str, Any]:
    if name == "cpu":
        from bitnet_mlx.backends.cpu_jit import isa, threads

        processor, _ = isa.features()
        return {
            "processor": processor,
            "body": isa.body_name(),
            "threads": threads.get_threads(),
            "threading_layer": threads.threading_layer(),
        }
    import mlx.core as mx

    return {"device": str(mx.default_device()), "dtype": model.dtype}


def table(report: Report) -> str:
    """The report for a reader."""
    lines = [
        f"bitnet-mlx {report.version}, Python {report.python} on {report.system} ({report.machine})",
        "packages: " + ", ".join(f"{name} {version or 'absent'}" for name, version in report.packages.items()),
        f"automatic choice: {report.chosen} ({report.reason})",
        "",
    ]
    for engine in report.engines:
        details = ", ".join(f"{key} {value}" for key, value in engine.details.items())
        lines.append(f"{engine.name:<6} {_verdict(engine)}" + (f" [{details}]" if details else ""))
    lines.append("")
    lines.append(
        "all engines agree" if report.ok else "an engine is wrong on this machine: do not use it, and report this"
    )
    return "\n".join(lines)


def _verdict(engine: EngineReport) -> str:
    if not engine.available:
        return f"absent: {engine.reason}"
    if engine.exact is None:
        return f"failed: {engine.reason}"
    if engine.exact:
        return "the reference's bits" if engine.name != "numpy" else "the reference"
    tokens = "the same tokens" if engine.same_tokens else "other tokens at near-ties"
    state = "close" if engine.ok else "WRONG"
    return f"{state}: within {engine.worst:.1e} of the logits' spread, {tokens}"
