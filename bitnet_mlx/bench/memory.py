"""A plan held against a run: fill a model's caches to the planned length, and count what it then holds."""

from __future__ import annotations

import tracemalloc
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bitnet_mlx.api import load
from bitnet_mlx.backends import ON_MLX, check_threads, choose, missing
from bitnet_mlx.bench.stamp import stamp
from bitnet_mlx.errors import ConfigError
from bitnet_mlx.memory import MemoryTracker
from bitnet_mlx.memory.machine import this_machine
from bitnet_mlx.memory.plan import Machine, Plan, make_plan
from bitnet_mlx.memory.show import size, text_table
from bitnet_mlx.models.config import DecoderConfig
from bitnet_mlx.models.decoder import Decoder
from bitnet_mlx.models.demand import demand, passes
from bitnet_mlx.models.owners import cache_bytes, holdings
from bitnet_mlx.models.precision import check_kv_bits, for_engine, policy
from bitnet_mlx.profile.plots import check_path, draw

ALLOWED = 0.05  # a prediction may be off by so much of the total
_PARTS = ("weights", "head", "kv_cache", "activations")


@dataclass(frozen=True)
class Measured:
    """Bytes of a run. activations: their most. error: (total - predicted) / predicted. process_*: of the whole process."""

    weights: int
    head: int
    kv_cache: int
    activations: int
    total: int
    error: float
    process_before: int
    process_peak: int

    @property
    def within(self) -> bool:
        """Whether the prediction held."""
        return abs(self.error) <= ALLOWED


def predict(
    path: Path,
    name: str,
    backend: str = "auto",
    context: int | None = None,
    batch: int = 1,
    *,
    machine: Machine | None = None,
    adapter_path: str | None = None,
    **options: Any,
) -> Plan:
    """The plan for a model that lies at `path`. options: head_bits, kv_bits, dtype and threads,
    as demand takes them, and precision. Raises what the files' headers and the adapter's files give reason for."""
    from bitnet_mlx.checkpoint.weigh import model_size

    engine = choose(backend).name
    check_kv_bits(options.get("kv_bits"), engine)
    check_threads(options.get("threads"), engine)
    use = for_engine(policy(options.pop("precision", None)), engine)[0].replaced(**options)
    options |= {"head_bits": use.head_bits, "kv_bits": use.kv_bits, "dtype": use.dtype}
    found = model_size(path, name)
    if adapter_path is not None:
        from bitnet_mlx.checkpoint.adapter import read_parts

        found = found.with_adapter(read_parts(adapter_path, found.config))
    if options.get("dtype") is None:
        options["dtype"] = usual_dtype(found.config, engine)
    if engine == "cpu" and options.get("threads") is None:
        from bitnet_mlx.backends.cpu_jit.threads import get_threads

        options["threads"] = get_threads()
    return make_plan(demand(found, engine, **options), machine or this_machine(engine), context, batch)


def usual_dtype(config: DecoderConfig, engine: str) -> str:
    """Of what passes between layers, as models.decoder_mlx.model_dtype takes it when nobody asks for one."""
    gpu = engine in ("metal", "cuda") or (engine == "mlx" and not (missing("metal") and missing("cuda")))
    if not gpu or config.dtype not in ("bfloat16", "float16"):
        return "float32"
    return "bfloat16" if config.hidden_act == "relu2" else config.dtype


def run(plan: Plan, path: Path, *, plot: str | None = None, **options: Any) -> Measured:
    """Load the model, fill `plan.batch` caches with `plan.context` positions, and count. options: as load takes them.

    plot: a .png or .html file for the timeline by owner. Raises ConfigError for a context that the model does not have.
    """
    if plan.context > plan.model_context:
        raise ConfigError(f"[memory] --run with a context of {plan.context}; the model takes 1 to {plan.model_context}")
    if plot is not None:
        check_path(plot)
    with MemoryTracker() as tracker:
        start = tracker.read()
        with tracker.scope("load"):
            model, _ = load(path, backend=plan.engine, **options)
        tracing = model.name == "numpy"
        if tracing:
            tracemalloc.start()
        try:
            with tracker.scope("run") as scope:
                caches = _fill(model, plan, tracker)
                kv = cache_bytes(caches)
            peak = tracemalloc.get_traced_memory()[1] if tracing else 0
        finally:
            if tracing:
                tracemalloc.stop()
        held = holdings(model)
    if plot is not None:
        draw({"bench": "tracker", "backend": model.name, **stamp(model.name), **tracker.record()}, plot)
    if model.name in ON_MLX:
        others = start.mlx_active or 0  # what this process had in MLX before
        activations = (scope.mlx_peak or 0) - others - held["weights"] - held["head"] - kv
    else:
        activations = max(peak - kv, 0) if tracing else held["activations"] + 4 * plan.batch * model.config.vocab_size
    total = held["weights"] + held["head"] + kv + activations
    error = (total - plan.total) / plan.total
    return Measured(held["weights"], held["head"], kv, activations, total, error, start.used, tracker.peak_used)


def _fill(model: Decoder, plan: Plan, tracker: MemoryTracker) -> list[Any]:
    """Caches of so many positions; what they hold does not matter."""
    caches = [model.make_cache(plan.context) for _ in range(plan.batch)]
    for cache in caches:
        tracker.own(cache, "kv_cache", keep=True, on_mlx=model.name in ON_MLX)
    ids = [i % model.config.vocab_size for i in range(plan.context)]
    for start, end in passes(plan.context):
        model.step([ids[start:end]] * plan.batch, caches)
        tracker.tick()
    return caches


def lines(plan: Plan, measured: Measured) -> str:
    """Prediction and measurement side by side."""
    rows = []
    for name in (*_PARTS, "total"):
        one, two = getattr(plan, name), getattr(measured, name)
        rows.append([name.replace("_", " "), size(one), size(two), f"{(two - one) / one:+.1%}" if one else "-"])
    rows.append(
        ["process", "", f"{size(measured.process_before)} before, {size(measured.process_peak)} at its peak", ""]
    )
    return text_table(["", "predicted", "measured", "apart"], rows)


def record(plan: Plan, measured: Measured | None) -> dict[str, Any]:
    """For JSON."""
    found = plan.record()
    if measured is not None:
        found["measured_run"] = {**asdict(measured), "within": measured.within}
    return found
