"""Held-out loss of the training graph, many windows at a time."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from bitnet_mlx.quality.bits import windows


def total_nats(
    losses: Callable[[mx.array], mx.array], ids: np.ndarray, length: int, stride: int, batch: int = 32
) -> float:
    """Cross entropy of ids [tokens] in nats, over windows as quality/bits.py lays them.

    losses: ids [B, L + 1] -> float32 [B, L]. Only the only window of a short text is shorter than `length`.
    """
    chosen = list(windows(len(ids), length, stride))
    nats = 0.0
    for at in range(0, len(chosen), batch):
        part = chosen[at : at + batch]
        rows = np.stack([ids[w.start : w.stop + 1] for w in part]).astype(np.int32)
        scored = np.array(losses(mx.array(rows))).astype(np.float64)
        nats += sum(float(row[w.skip :].sum()) for row, w in zip(scored, part, strict=True))
    return nats
