"""Learning rate and weight decay as functions of the step."""

from __future__ import annotations

import math


def learning_rate(step: int, peak: float, iters: int, warmup: int, final: float = 0.01) -> float:
    """Linear warm-up over `warmup` steps, then a cosine from `peak` to `final * peak` at the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, iters - 1 - warmup)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def weight_decay(step: int, decay: float, iters: int) -> float:
    """`decay` in the first half and 0 after: late in ternary training, decay keeps latent weights near the rounding
    threshold, and they flip back and forth (the two-stage schedule of the BitNet b1.58 training notes)."""
    return decay if 2 * step < iters else 0.0
