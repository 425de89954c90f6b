"""The compiled step's own products and codes on every boundary shape, against plain integer arithmetic.

Single jobs of the step are run: PREPARE quantises rows, OUT multiplies them with a linear and adds the result to X.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from bitnet_mlx.backends.cpu_jit import compiled
from bitnet_mlx.backends.cpu_jit import layout as at
from bitnet_mlx.formats import words2
from bitnet_mlx.formats.dense import DenseRows
from bitnet_mlx.models.config import DecoderConfig
from bitnet_mlx.models.cpu_tables import LINEAR_NAMES, Buffers, WeightTables, address
from bitnet_mlx.models.weights import DecoderWeights, Linear
from bitnet_mlx.ternary import TernaryTensor, padded
from tests.backend import shapes
from tests.backend.test_cpu_product import planes

ONE = TernaryTensor(words2.pack(np.ones((1, 8), np.int8)), np.asarray(1, np.float32), (1, 8))


class Jobs:
    """The state of a step whose O projection is `weight`, for `rows` rows; run(job, items) runs one job of it."""

    def __init__(self, weight: TernaryTensor, bias: np.ndarray | None, rows: int) -> None:
        n, k = weight.shape
        config = DecoderConfig("bitnet", 1, n, 8, 1, 1, 1, k)
        head = DenseRows(np.ones((1, n), np.float32), "float32")
        weights = DecoderWeights(config, head, head)
        for name in LINEAR_NAMES:
            chosen = Linear(weight, bias) if name == "self_attn.o_proj" else Linear(ONE)
            weights.linears[f"model.layers.0.{name}"] = chosen
        for name, size in config.norm_sizes().items():
            weights.norms[f"model.layers.0.{name}"] = np.ones(size, np.float32)
        weights.norms["model.norm"] = np.ones(n, np.float32)
        self.tables, self.buffers = WeightTables(weights), Buffers(config)
        self.state = np.zeros(at.STATE_SIZE, np.int64)
        self.tables.describe(self.state)
        self.buffers.fit(self.state, rows, 1, 1)
        self.tokens = 8 if rows >= at.PANEL_FROM else 1
        self.state[at.ROWS], self.state[at.TOKENS], self.state[at.WANTS] = rows, self.tokens, 1

    def memory(self, slot: int, count: int, dtype: type) -> np.ndarray:
        """`count` elements of a buffer."""
        first = int(self.state[slot]) - address(self.buffers.block)
        return self.buffers.block[first : first + count * np.dtype(dtype).itemsize].view(dtype)

    def run(self, job: int, items: int) -> None:
        compiled.compiled_step()
        assert compiled._kept is not None
        self.state[at.JOB], self.state[at.ITEMS], self.state[at.GRAIN], self.state[at.COUNTER] = job, items, 1, 0
        compiled._kept[0].ctypes(address(self.state), 0)


class Cpu:
    """The cpu engine's products, numpy arrays in and out."""

    def linear(self, q: np.ndarray, s: np.ndarray, weight: TernaryTensor, bias: np.ndarray | None) -> np.ndarray:
        (m, k), n = q.shape, weight.shape[0]
        jobs = Jobs(weight, bias, m)
        codes = planes(q, jobs.tokens)
        jobs.memory(at.CODES, codes.size, np.int8)[:] = codes.reshape(-1)
        blocks = padded(k) // 128
        wide = np.zeros((m, blocks * 128), np.int32)
        wide[:, :k] = q
        sums = wide.reshape(m, blocks, 128).sum(axis=2)
        table = jobs.memory(at.SUMS, m * (blocks + 1), np.int32).reshape(m, blocks + 1)
        table[:, :blocks], table[:, blocks] = sums, sums.sum(axis=1)
        jobs.memory(at.SCALES, m, np.float32)[:] = s
        jobs.run(at.OUT, -(-n // at.TILE))
        return jobs.memory(at.X, m * padded(n), np.float32).reshape(m, -1)[:, :n].copy()

    def accumulate(self, q: np.ndarray, weight: TernaryTensor) -> np.ndarray:
        """With all scales 1 the outputs are the accumulators; with one group's scale 1 and the others 0, that group's."""
        s = np.ones(len(q), np.float32)
        if weight.scale.ndim < 2:
            return self.linear(q, s, TernaryTensor(weight.words, np.asarray(1, np.float32), weight.shape), None)
        groups = []
        for g in range(weight.groups):
            scale = np.zeros_like(weight.scale)
            scale[:, g] = 1
            groups.append(self.linear(q, s, TernaryTensor(weight.words, scale, weight.shape), None))
        return np.stack(groups, axis=1)


def quantize(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The codes and scales that PREPARE writes, read back from its planes."""
    m, k = x.shape
    jobs = Jobs(TernaryTensor(words2.pack(np.ones((1, k), np.int8)), np.asarray(1, np.float32), (1, k)), None, m)
    held = np.ascontiguousarray(x)
    jobs.state[at.INPUT], jobs.state[at.INPUT_STRIDE], jobs.state[at.K] = address(held), k, k
    jobs.run(at.PREPARE, m)
    blocks, tokens = padded(k) // 128, jobs.tokens
    panels = -(-m // tokens)
    codes = jobs.memory(at.CODES, panels * tokens * blocks * 128, np.int8).reshape(panels, blocks, tokens, 4, 32)
    rows = codes.transpose(0, 2, 1, 4, 3).reshape(panels * tokens, blocks * 128)
    assert not rows[:m, k:].any()
    return rows[:m, :k].copy(), jobs.memory(at.SCALES, m, np.float32).copy()


@pytest.mark.parametrize(("n", "k"), shapes.PAIRS)
def test_products_equal_integer_arithmetic(n: int, k: int) -> None:
    shapes.check_products(n, k, Cpu())


@pytest.mark.parametrize("k", shapes.K)
def test_codes_equal_plain_rounding(k: int) -> None:
    shapes.check_codes(k, quantize)


def test_a_wrong_order_of_scaling_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """acc * scale / s instead of acc / s * scale: the harness fails."""
    sound: Callable[..., np.ndarray] = Cpu.linear

    def other(self: Cpu, q: np.ndarray, s: np.ndarray, weight: TernaryTensor, bias: np.ndarray | None) -> np.ndarray:
        if bias is not None or weight.scale.ndim == 2 or (s == 1).all():
            return sound(self, q, s, weight, bias)
        return (self.accumulate(q, weight) * weight.scale) / s[:, None]

    monkeypatch.setattr(Cpu, "linear", other)
    with pytest.raises(AssertionError, match="outputs"):
        for n, k in shapes.PAIRS[:12]:
            shapes.check_products(n, k, Cpu())
