"""What a model costs in memory: a tracker that measures it, a plan that predicts it, limits and pressure."""

from bitnet_mlx.memory.mlx_counters import clear_cache, set_limits
from bitnet_mlx.memory.tracker import MemoryTracker, current, scope, tick

__all__ = ["MemoryTracker", "clear_cache", "current", "scope", "set_limits", "tick"]
