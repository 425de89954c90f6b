"""Ternary weights nearest to floats: t and s that make |w - s t|^2 least, exactly, for a tensor, each row, or 128 columns.

With n weights not 0 the best t takes the signs of the n largest |w|, and s their mean; what is left of |w|^2 is then less by
(sum of the n largest)^2 / n. So one sort and one look at all n find the least of all; alternating between t and s from
absmean's start stops where neither alone gets better, which need not be it.
"""

from __future__ import annotations

import numpy as np

from bitnet_mlx.errors import ConfigError
from bitnet_mlx.formats import words2
from bitnet_mlx.ternary import GROUP, MIN_SCALE, SCALES, TernaryTensor, padded

_ROWS = 512  # fitted at a time where rows have scales of their own
Fitted = tuple[np.ndarray, np.ndarray]


def fit(w: np.ndarray, granularity: str = "group") -> Fitted:
    """(t int8 [N, K], scale float32 [], [N] or [N, padded(K) / 128]) of float w [N, K]. granularity: one of SCALES."""
    check_granularity(granularity)
    w = np.asarray(w, np.float32)
    if granularity != "tensor" and len(w) > _ROWS:
        parts = [fit(w[at : at + _ROWS], granularity) for at in range(0, len(w), _ROWS)]
        return np.concatenate([t for t, _ in parts]), np.concatenate([s for _, s in parts])
    blocks = grouped(w, granularity)
    s = scales_of(blocks)
    t = codes(blocks, s[..., None]).reshape(w.shape[0], -1)[:, : w.shape[1]]
    return np.ascontiguousarray(t), shaped(s, granularity)


def scales_of(blocks: np.ndarray) -> np.ndarray:
    """The best scale of each block: float [..., B] -> float32 [...]; the least that is allowed where all are 0."""
    sums = np.cumsum(np.sort(np.abs(blocks), axis=-1)[..., ::-1], axis=-1, dtype=np.float64)
    count = np.arange(1, blocks.shape[-1] + 1)
    best = np.argmax(np.square(sums) / count, axis=-1)[..., None]
    return np.maximum((np.take_along_axis(sums, best, -1) / (best + 1))[..., 0].astype(np.float32), MIN_SCALE)


def codes(w: np.ndarray, s: np.ndarray) -> np.ndarray:
    """The nearest of -1, 0, 1 times s, int8; halves go to 0."""
    return np.clip(np.rint(w / s), -1, 1).astype(np.int8)


def grouped(w: np.ndarray, granularity: str) -> np.ndarray:
    """[N, K] -> [1, 1, N K], [N, 1, K] or [N, G, 128], padded with 0: the last axis shares a scale."""
    n, k = w.shape
    if granularity == "tensor":
        return w.reshape(1, 1, -1)
    if granularity == "row":
        return w.reshape(n, 1, k)
    wide = np.zeros((n, padded(k)), w.dtype)
    wide[:, :k] = w
    return wide.reshape(n, -1, GROUP)


def shaped(s: np.ndarray, granularity: str) -> np.ndarray:
    """Scales of `grouped`'s blocks as a TernaryTensor has them."""
    return s.reshape(()) if granularity == "tensor" else s[:, 0] if granularity == "row" else np.ascontiguousarray(s)


def tensor(fitted: Fitted, activation_bits: int = 8) -> TernaryTensor:
    """What runs, of (t, scale)."""
    t, scale = fitted
    return TernaryTensor(words2.pack(t), np.array(scale, np.float32, order="C"), t.shape, activation_bits)


def spread(scale: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A scale for each weight, float64 [N, K]; a view where that will do."""
    k = shape[1]
    if scale.ndim < 2:
        return np.broadcast_to(scale.astype(np.float64).reshape(-1, 1), shape)
    return np.repeat(scale.astype(np.float64), GROUP, axis=1)[:, :k]


def check_granularity(granularity: str) -> None:
    """Raises ConfigError for one that there is not."""
    if granularity not in SCALES:
        raise ConfigError(f"[ternarize] scales are to be per {granularity!r}; {', '.join(SCALES)} are allowed")
