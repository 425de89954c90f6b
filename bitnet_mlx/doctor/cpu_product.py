"""One product of the cpu engine by itself: the job of its step that quantises rows, and the one that multiplies them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from bitnet_mlx.backends.cpu_jit import layout as at
from bitnet_mlx.formats import words2
from bitnet_mlx.formats.dense import DenseRows
from bitnet_mlx.models.config import DecoderConfig
from bitnet_mlx.models.cpu_tables import LINEAR_NAMES, Buffers, WeightTables, address
from bitnet_mlx.models.weights import DecoderWeights, Linear
from bitnet_mlx.ternary import TernaryTensor, padded


class CpuProduct:
    """x [M, K] float32 -> [M, N], quantised and multiplied by `weight`, which is the O projection of a decoder of one layer."""

    def __init__(self, weight: TernaryTensor, rows: int, threads: int) -> None:
        n, k = weight.shape
        config = DecoderConfig("bitnet", 1, n, 8, 1, 1, 1, k)
        head = DenseRows(np.ones((1, n), np.float32), "float32")
        weights = DecoderWeights(config, head, head)
        unit = TernaryTensor(words2.pack(np.ones((1, 8), np.int8)), np.asarray(1, np.float32), (1, 8))
        for name in LINEAR_NAMES:
            weights.linears[f"model.layers.0.{name}"] = Linear(weight if name == "self_attn.o_proj" else unit)
        for name, size in config.norm_sizes().items():
            weights.norms[f"model.layers.0.{name}"] = np.ones(size, np.float32)
        weights.norms["model.norm"] = np.ones(n, np.float32)
        threads = 1 if rows * n * k < at.SERIAL else threads  # as the engine's own step decides
        self._shape, self._threads = (rows, n, k), threads
        self._pool = ThreadPoolExecutor(threads)
        self._tables, self._buffers = WeightTables(weights), Buffers(config)
        self._state = np.zeros(at.STATE_SIZE, np.int64)
        self._tables.describe(self._state)
        self._buffers.fit(self._state, rows, 1, threads)
        self._state[at.ROWS], self._state[at.TOKENS] = rows, 8 if rows >= at.PANEL_FROM else 1
        self._state[at.WANTS] = 1

    def quantise(self, x: np.ndarray) -> None:
        """Take float32 x [M, K] as the input."""
        rows, _, k = self._shape
        held = np.ascontiguousarray(x, np.float32)
        self._state[at.INPUT], self._state[at.INPUT_STRIDE], self._state[at.K] = address(held), k, k
        self._run(at.PREPARE, rows, 1)

    def multiply(self) -> np.ndarray:
        """float32 [M, N]."""
        rows, n, _ = self._shape
        out = self._output()
        out[:] = 0  # the job adds to it
        items = -(-n // at.TILE)
        self._run(at.OUT, items, max(1, items // (at.PORTIONS * self._threads)) if rows == 1 else 1)
        return out[:, :n]

    def _output(self) -> np.ndarray:
        rows, n, _ = self._shape
        first = int(self._state[at.X]) - address(self._buffers.block)
        return self._buffers.block[first : first + rows * padded(n) * 4].view(np.float32).reshape(rows, -1)

    def _run(self, job: int, items: int, grain: int) -> None:
        from bitnet_mlx.backends.cpu_jit.compiled import compiled_worker

        work, state = compiled_worker(), address(self._state)
        self._state[at.JOB], self._state[at.ITEMS], self._state[at.GRAIN], self._state[at.COUNTER] = (
            job,
            items,
            grain,
            0,
        )
        if self._threads == 1:
            work(state, 0)
            return
        list(self._pool.map(lambda worker: work(state, worker), range(self._threads)))
