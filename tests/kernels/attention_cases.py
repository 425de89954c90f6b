"""Inputs of one token's attention with garbage wherever nothing may be read from, and what must come out, by float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bitnet_mlx.backends import numpy_ref
from tests.backend.shapes import same
from tests.kernels.quantize_cases import DTYPES

UNIT = {
    "float32": 2.0**-24,
    "bfloat16": 2.0**-8,
    "float16": 2.0**-11,
}  # half of the last place, of the values where it is largest
FLOAT32 = 2.0**-15  # of sum |weight * value|: what scores and sums in float32 may be off, generously
ARRAYS = ("qkv", "cos", "sin", "past", "recent", "lengths")


@dataclass(frozen=True)
class Case:
    """Sizes of one call; old and new: how many positions count in `past` and in `recent`."""

    heads: int = 4
    kv_heads: int = 1
    dim: int = 64
    room: int = 5
    old: int = 3
    new: int = 2
    dtype: str = "float32"
    batch: int = 1
    angles: int = 1
    slots: int = 64
    spread: float = 1.0  # of queries: with 8 a few positions take nearly all of the weight

    def inputs(self) -> tuple[np.ndarray, ...]:
        """The arrays of ARRAYS. What does not count in `past` and `recent` is NaN, infinite or huge."""
        rng = np.random.default_rng((self.heads, self.kv_heads, self.dim, self.room, self.old, self.new, self.batch))
        kind = DTYPES[self.dtype]
        qkv = rng.standard_normal((self.batch, 1, self.heads + 2 * self.kv_heads, self.dim)).astype(np.float32)
        qkv[:, :, : self.heads] *= self.spread
        turn = rng.uniform(-4000, 4000, (self.angles, 1, self.dim // 2))
        past, recent = (
            _held(rng, (2, self.batch, self.kv_heads, room, self.dim), count)
            for room, count in ((self.room, self.old), (self.slots, self.new))
        )
        return (
            qkv.reshape(self.batch, 1, -1).astype(kind),
            np.cos(turn).astype(np.float32),
            np.sin(turn).astype(np.float32),
            past.astype(kind),
            recent.astype(kind),
            np.array([self.old, self.new], np.int32),
        )


def _held(rng: np.random.Generator, shape: tuple[int, ...], count: int) -> np.ndarray:
    x = rng.standard_normal(shape).astype(np.float32)
    x[:, :, :, count:] = rng.choice(np.array([np.nan, np.inf, -np.inf, 6e4], np.float32), x[:, :, :, count:].shape)
    return x


def token(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """The new token's rotated queries [B, heads, D] and its keys and values [2, B, kv_heads, D], of the case's dtype."""
    qkv, cos, sin = case.inputs()[:3]
    rotated, values = [], []
    for b in range(case.batch):
        x = qkv[b].astype(np.float32).reshape(1, -1, case.dim)
        at = b % case.angles
        rotated.append(numpy_ref.rope(x[:, : case.heads + case.kv_heads], cos[at], sin[at])[0])
        values.append(x[0, case.heads + case.kv_heads :])
    turned = np.stack(rotated).astype(qkv.dtype)
    return turned[:, : case.heads], np.stack([turned[:, case.heads :], np.stack(values).astype(qkv.dtype)])


def attended(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """(out, sum of |weight * value|), both float64 [B, heads, D]: a loop over batches and heads."""
    past, recent = (a.astype(np.float64) for a in case.inputs()[3:5])
    q, new = (a.astype(np.float64) for a in token(case))
    out = np.zeros((2, case.batch, case.heads, case.dim))
    for b in range(case.batch):
        for h in range(case.heads):
            kv = h // (case.heads // case.kv_heads)
            keys, values = (
                np.concatenate([past[i, b, kv, : case.old], recent[i, b, kv, : case.new], new[i, b, kv][None]])
                for i in (0, 1)
            )
            scores = keys @ q[b, h] / np.sqrt(case.dim)
            weight = np.exp(scores - scores.max())
            weight /= weight.sum()
            out[:, b, h] = weight @ values, weight @ np.abs(values)
    return out[0], out[1]


def check(case: Case, out: np.ndarray, recent: np.ndarray) -> None:
    """Fail unless `out` is the reference's within its dtype's rounding, and the slots that count are its very bits."""
    expected, size = attended(case)
    assert out.shape == (case.batch, 1, case.heads * case.dim) and out.dtype == DTYPES[case.dtype], (
        f"{case}: {out.shape}"
    )
    found = out.astype(np.float64).reshape(expected.shape)
    allowed = UNIT[case.dtype] * np.abs(expected) + FLOAT32 * size
    off = np.abs(found - expected) / allowed
    assert (off <= 1).all(), f"{case}: off by {off.max()} times what is allowed"
    before = case.inputs()[4]
    assert recent.shape == before.shape and recent.dtype == before.dtype
    same(recent[:, :, :, : case.new], before[:, :, :, : case.new], f"slots held, {case}")
    same(recent[:, :, :, case.new], token(case)[1], f"the new slot, {case}")
    assert np.isfinite(recent.astype(np.float32)).all(), f"{case}: slots beyond are not finite"
