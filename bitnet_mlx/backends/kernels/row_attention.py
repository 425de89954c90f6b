"""A decode step's attention as a row kernel: how it is launched, checked against float64, and what stock MLX does instead."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bitnet_mlx.backends import numpy_ref
from bitnet_mlx.backends.attention_mlx import RECENT
from bitnet_mlx.backends.kernels import attention, check, problem
from bitnet_mlx.backends.kernels.launch import Launch
from bitnet_mlx.backends.kernels.products import Runner
from bitnet_mlx.backends.kernels.run import DTYPES
from bitnet_mlx.backends.mlx_import import mx
from bitnet_mlx.ternary import matmul

_SHARES = 5  # of a check; a launch has as many as its shapes ask for
_ROOM = {False: 512, True: 2048}  # positions of a timed call, in one launch or two
# Half of a value's last place, relative to the value where that is most.
_UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
# What float32 scores and sums may be off, relative to the sum of |weight * value|. On a CPU 2^-24 was seen, 2^-18 where
# scores reach 100; the exponentials of a GPU are less exact.
_FLOAT32 = 2.0**-14
# Positions that count in past (of _CHECK_ROOM) and in recent.
_CHECK_ROOM = 301
_LENGTHS = ((0, 0), (301, 0), (257, 63), (0, 40))


@dataclass(frozen=True)
class DecodeAttention:
    """queries, simdgroups: of attention.Plan. split: whether two launches share the positions."""

    heads: int
    kv_heads: int
    dim: int
    dtype: str
    queries: int
    simdgroups: int
    split: bool

    @staticmethod
    def of(batch: int, heads: int, kv_heads: int, dim: int, room: int, slots: int, dtype: str) -> DecodeAttention:
        """The kernel that a call of these sizes takes; `possible` must hold."""
        cut = attention.plan(batch, heads, kv_heads, dim, room, slots, dtype)
        return DecodeAttention(heads, kv_heads, dim, dtype, cut.queries, cut.simdgroups, cut.shares > 1)

    @property
    def question(self) -> str:
        parts = f"{self.queries} at once" + (" in shares" if self.split else "")
        return f"attention {self.heads}+{self.kv_heads} heads of {self.dim} {self.dtype}, {parts}"

    def run(self, runner: Runner, *arrays: Any, shares: int | None = None) -> tuple[mx.array, mx.array]:
        """out and recent' of the six arrays that attention_mlx.decode_attention takes. shares: None, by their shapes."""
        qkv, past, recent = arrays[0], arrays[3], arrays[4]
        if shares is None:
            batch, room, slots = qkv.shape[0], past.shape[3], recent.shape[3]
            shares = attention.plan(batch, self.heads, self.kv_heads, self.dim, room, slots, self.dtype).shares
        found, kept = runner(self.launch(*arrays, shares=shares))
        return (runner(attention.merge(found, self.dtype))[0] if shares > 1 else found), kept

    def launch(self, *arrays: Any, shares: int) -> Launch:
        """The first of the launches."""
        qkv, cos, sin, past, recent, lengths = arrays
        cut = attention.Plan(self.queries, self.simdgroups, shares)
        return attention.decode_attention(
            qkv, cos, sin, past, recent, lengths, heads=self.heads, dtype=self.dtype, cut=cut
        )

    def check(self, runner: Runner) -> check.Verdict:
        """Output within _UNIT and _FLOAT32 of float64's; the slots of recent' that count equal to the bit."""

        def checked() -> check.Verdict:
            found = check.Verdict(0)
            for lengths in _LENGTHS:
                data = Data.of(self, lengths)
                arrays = data.arrays(self.dtype)
                out, kept = self.run(runner, *arrays, shares=_SHARES if self.split else 1)
                found += data.verdict(np.array(out.astype(mx.float32)), np.array(kept.astype(mx.float32)), self.dtype)
            return found

        return check.guarded(checked)

    def chain(self, runner: Runner | None, calls: int) -> mx.array:
        room = _ROOM[self.split]
        x = mx.ones((1, 1, (self.heads + 2 * self.kv_heads) * self.dim), DTYPES[self.dtype])
        past = mx.ones((2, 1, self.kv_heads, room, self.dim), x.dtype)
        if runner is None:
            return self._plain_chain(x, past[0], past[1], calls)
        angle = mx.ones((1, 1, self.dim // 2), mx.float32)
        recent = mx.ones((2, 1, self.kv_heads, RECENT, self.dim), x.dtype)
        lengths = mx.array([room, RECENT // 2], mx.int32)
        for _ in range(calls):
            out, recent = self.run(runner, x, angle, angle, past, recent, lengths)
            x = x + out.reshape(-1)[:1] * 0
        return x + recent.reshape(-1)[:1] * 0

    def _plain_chain(self, x: mx.array, keys: mx.array, values: mx.array, calls: int) -> mx.array:
        """The same as plain MLX code has it: rotation of queries and of keys, two writes into the cache, attention."""
        last = keys.shape[2] - 1
        for _ in range(calls):
            q, k, v = mx.split(x, [self.heads * self.dim, (self.heads + self.kv_heads) * self.dim], axis=-1)
            q, k, v = (a.reshape(1, 1, -1, self.dim).transpose(0, 2, 1, 3) for a in (q, k, v))
            q, k = (mx.fast.rope(a, self.dim, traditional=False, base=1e4, scale=1.0, offset=last) for a in (q, k))
            keys[:, :, last:], values[:, :, last:] = k, v
            out = mx.fast.scaled_dot_product_attention(q, keys, values, scale=self.dim**-0.5)
            x = x + out.reshape(-1)[:1] * 0
        return x


def both(heads: int, kv_heads: int, dim: int, dtype: str) -> list[DecodeAttention]:
    """The kernels of one sequence's short and long contexts."""
    return [DecodeAttention.of(1, heads, kv_heads, dim, room, RECENT, dtype) for room in _ROOM.values()]


@dataclass(frozen=True)
class Data:
    """float32 arrays with values of the kernel's dtype, and what must come of them: out and its size by float64.

    qkv [heads + 2 kv_heads, D]; cos, sin [D / 2]; past, recent [2, kv_heads, P or R, D], NaN where nothing counts.
    out, size [heads, D]: size is the sum of |weight * value|. new [2, kv_heads, D]: the slot that is written.
    """

    qkv: np.ndarray
    cos: np.ndarray
    sin: np.ndarray
    past: np.ndarray
    recent: np.ndarray
    lengths: tuple[int, int]
    out: np.ndarray
    size: np.ndarray
    new: np.ndarray

    @classmethod
    def of(cls, kernel: DecodeAttention, lengths: tuple[int, int]) -> Data:
        heads, kv_heads, dim = kernel.heads, kernel.kv_heads, kernel.dim
        rng = np.random.default_rng((heads, kv_heads, dim, *lengths))

        def values(*shape: int) -> np.ndarray:
            return problem.rounded(rng.standard_normal(shape).astype(np.float32), kernel.dtype)

        qkv = values(heads + 2 * kv_heads, dim)
        turn = rng.uniform(0, 4000, dim // 2)
        cos, sin = np.cos(turn).astype(np.float32), np.sin(turn).astype(np.float32)
        past, recent = values(2, kv_heads, _CHECK_ROOM, dim), values(2, kv_heads, RECENT, dim)
        past[:, :, lengths[0] :], recent[:, :, lengths[1] :] = np.nan, np.nan
        rotated = numpy_ref.rope(qkv[None, : heads + kv_heads], cos[None], sin[None])[0]
        turned = problem.rounded(rotated, kernel.dtype)
        new = np.stack([turned[heads:], qkv[heads + kv_heads :]])
        counted = [past[:, :, : lengths[0]], recent[:, :, : lengths[1]], new[:, :, None]]
        keys, rows = np.concatenate(counted, axis=2).astype(np.float64)
        q = turned[:heads].astype(np.float64).reshape(kv_heads, -1, dim)
        scores = matmul(q, keys.swapaxes(1, 2)) / np.sqrt(dim)
        weight = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weight /= weight.sum(axis=-1, keepdims=True)
        out, size = (matmul(weight, v).reshape(heads, dim) for v in (rows, np.abs(rows)))
        return cls(qkv, cos, sin, past, recent, lengths, out, size, new)

    def arrays(self, dtype: str) -> tuple[mx.array, ...]:
        """The inputs of a launch, B = 1."""
        of = DTYPES[dtype]
        floats = (mx.array(a).reshape(1, 1, -1) for a in (self.qkv, self.cos, self.sin))
        qkv, cos, sin = floats
        past, recent = (mx.array(a[:, None]).astype(of) for a in (self.past, self.recent))
        return qkv.astype(of), cos, sin, past, recent, mx.array(self.lengths, mx.int32)

    def verdict(self, out: np.ndarray, kept: np.ndarray, dtype: str) -> check.Verdict:
        """out [1, 1, heads * D] and kept [2, 1, kv_heads, R, D] of a launch, as float32."""
        if out.size != self.out.size or kept.size != self.recent.size:
            return check.Verdict(self.out.size, self.out.size)
        allowed = _UNIT[dtype] * np.abs(self.out) + _FLOAT32 * self.size
        wrong = ~(np.abs(out.reshape(self.out.shape) - self.out) <= allowed)
        held = self.lengths[1]
        slots = self.recent.copy()
        slots[:, :, held] = self.new
        cached = check.compared(kept.reshape(slots.shape)[:, :, : held + 1], slots[:, :, : held + 1])
        infinite = int((~np.isfinite(kept)).sum())
        return replace(cached, total=cached.total + wrong.size, wrong=cached.wrong + int(wrong.sum()) + infinite)
