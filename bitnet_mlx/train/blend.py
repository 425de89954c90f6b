"""From float to ternary: how much of each layer is quantised at a step.

constant: all from the first step. linear: b grows evenly over the blend's steps. exponential: 1 - b falls to a thousandth
by equal factors, and then to 0. layers: one layer after another, each growing evenly, the first layer first.
"""

from __future__ import annotations

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
