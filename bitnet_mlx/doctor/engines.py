"""Each engine on the embedded model and a short text; the numpy engine is the reference.

The cpu engine must give its logits to the last bit. Engines on MLX sum softmax and head in another order, so their logits
must be close, in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bitnet_mlx.backends import NAMES, ON_MLX, missing
from bitnet_mlx.doctor.report import EngineReport
from bitnet_mlx.errors import BitnetError

TEXT = "def main():\n    return 0\n"
CLOSE = (
    0.3  # of the logits' spread: a flipped code moves them by some percent, a wrong product by several times the spread
)


def engines(progress: Callable[[str], None]) -> list[EngineReport]:
    """A report for each engine, the absent ones too."""
    from bitnet_mlx.api import load

    model, tokenizer = load(backend="numpy")
    ids = tokenizer.encode(TEXT)
    reference = model.step([ids], [model.make_cache()], "all")[0]
    found = [EngineReport("numpy", True, exact=True, worst=0.0, same_tokens=True)]
    for name in reversed(NAMES[1:-1]):
        progress(f"engine {name}")
        found.append(_compare(name, ids, reference))
    return found


def _compare(name: str, ids: list[int], reference: np.ndarray) -> EngineReport:
    from bitnet_mlx.api import load

    reason = missing(name)
    if reason:
        return EngineReport(name, False, reason)
    try:
        model, _ = load(backend=name, dtype="float32")
        logits = model.step([ids], [model.make_cache()], "all")[0]
    except (BitnetError, RuntimeError) as error:  # MLX raises RuntimeError where a device fails
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
    assert name in ON_MLX
    import mlx.core as mx

    return {"device": str(mx.default_device()), "dtype": model.dtype}
