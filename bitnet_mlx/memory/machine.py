"""This machine, as a plan sees it."""

from __future__ import annotations

from bitnet_mlx.memory import system
from bitnet_mlx.memory.plan import Machine


def this_machine(engine: str) -> Machine:
    """Total and available memory, and on a GPU engine what MLX says the GPU may hold."""
    working_set = None
    if engine in ("metal", "cuda"):
        import mlx.core as mx

        info = mx.device_info(mx.default_device())
        found = info.get("max_recommended_working_set_size") or info.get("memory_size")
        working_set = int(found) if found else None
    return Machine(system.total_bytes(), system.available_bytes(), working_set)
