"""From float to ternary: how much of each layer is quantised at a step.

constant: all from the first step. linear: b grows evenly over the blend's steps. exponential: 1 - b falls to a thousandth
by equal factors, and then to 0. layers: one layer after another, each growing evenly, the first layer first.
"""

from __future__ import annotations

import mlx.core as mx

# A float32 [] is an input of a compiled step; a number is part of its text. Both lie in 0 to 1.
Blend = float | mx.array
SCHEDULES = ("constant", "linear", "exponential", "layers")
_LEFT = 1e-3


def blends(schedule: str, step: int, steps: int, layers: int) -> list[float]:
    """The blend of each layer, in 0 to 1, for a step counted from 0. steps: after so many, every layer's is 1."""
    assert schedule in SCHEDULES
    done = 1.0 if schedule == "constant" or step >= steps else step / steps
    if schedule == "layers":
        return [min(1.0, max(0.0, done * layers - layer)) for layer in range(layers)]
    if schedule == "exponential" and done < 1:
        return [1 - _LEFT**done] * layers
    return [done] * layers


def ends(blend: Blend) -> int | None:
    """0 or 1 where the blend is known to be at an end, so that the other need not be computed; else None."""
    if isinstance(blend, mx.array) or 0 < blend < 1:
        return None
    return 1 if blend >= 1 else 0


def mixed(before: mx.array, after: mx.array, blend: mx.array) -> mx.array:
    """(1 - b) before + b after for b float32 []: `before` at 0 and `after` at 1, to the last bit; float32."""
    return (1 - blend) * before + blend * after
