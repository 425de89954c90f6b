"""The decoder on the cpu engine: the same bits as the numpy decoder, in one compiled call for all rows of a step.

Weights are used where they lie. Rows of all sequences go through the layers together, at most 256 at a time, each with
its own position and cache; every row's arithmetic has a fixed order, so batch and chunking change nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from bitnet_mlx.backends.cpu_jit import compiled, threads
from bitnet_mlx.backends.cpu_jit import layout as at
from bitnet_mlx.backends.numpy_ref import rms_norm
from bitnet_mlx.errors import BackendError
from bitnet_mlx.models.cache import KVCache
from bitnet_mlx.models.config import inverse_frequencies
from bitnet_mlx.models.cpu_tables import Buffers, WeightTables, address
from bitnet_mlx.models.rope import cos_sin
from bitnet_mlx.models.weights import DecoderWeights
from bitnet_mlx.ternary import padded


class CpuDecoder:
    """A decoder over DecoderWeights; see models/decoder.py for the interface. Needs numba."""

    name = "cpu"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.weights.described})"

    def __init__(self, weights: DecoderWeights, serial_below: int = at.SERIAL) -> None:
        """serial_below: weights times rows under which a product stays on the calling thread.

        Raises BackendError where numba is missing or a forced body does not suit the processor."""
        self.weights = weights
        self.config = weights.config
        self._compiled = compiled.compiled_step()
        self._tables = WeightTables(weights)
        linears = weights.linears.values()
        rank = max((linear.adapter.rank for linear in linears if linear.adapter is not None), default=0)
        self._buffers = Buffers(weights.config, any(linear.norm is not None for linear in linears), rank)
        self._inverse, self._rope_factor = inverse_frequencies(weights.config)
        self._cos = self._sin = np.zeros((0, len(self._inverse)), np.float32)
        room = np.zeros(at.STATE_SIZE + 8, np.int64)
        skip = -address(room) % 64 // 8  # the shared counter has a cache line of its own
        self._state = room[skip : skip + at.STATE_SIZE]
        self._tables.describe(self._state)
        self._state[at.SERIAL_BELOW] = serial_below

    def mark_jobs(self, room: np.ndarray | None) -> None:
        """From now on note when each job ends: into `room`, int64 [jobs, 3], from its first row on; None stops that.

        A row: the job's number, its layer (cpu_jit/layout.py), and nanoseconds of cpu_jit.clock.now(). Once the room is
        full nothing more is noted. It must live as long as steps write into it.
        """
        state = self._state
        state[at.MARKS], state[at.MARKED] = 0 if room is None else address(room), 0
        state[at.MARKS_ROOM] = 0 if room is None else len(room)

    @property
    def jobs_marked(self) -> int:
        """How many rows `mark_jobs` has filled."""
        return int(self._state[at.MARKED])

    def make_cache(self, limit: int | None = None) -> KVCache:
        return KVCache(self.config, limit=limit)

    def step(
        self, tokens: Sequence[Sequence[int]], caches: Sequence[KVCache], logits: Literal["last", "all"] = "last"
    ) -> list[np.ndarray]:
        """As Decoder.step; several Python threads may call it, one at a time runs.

        Raises BackendError for a sequence without tokens, a token outside the vocabulary, a cache given twice, or in a
        process forked under OpenMP; MemoryLimitError past a cache's limit. The caches then hold what they held.
        """
        y, ends = self._feed(tokens, caches, logits)
        return list(y) if logits == "last" else np.split(y, ends[:-1])

    def hidden(self, tokens: Sequence[Sequence[int]], caches: Sequence[KVCache]) -> list[np.ndarray]:
        """As Decoder.hidden; raises what step raises."""
        x, ends = self._feed(tokens, caches, "hidden")
        normed = rms_norm(x, self.weights.norms["model.norm"], self.config.rms_norm_eps)
        return np.split(normed, ends[:-1])

    def _feed(
        self, tokens: Sequence[Sequence[int]], caches: Sequence[KVCache], want: Literal["last", "all", "hidden"]
    ) -> tuple[np.ndarray, np.ndarray]:
        """(rows of all sequences, where each sequence ends among them): logits, or for "hidden" what comes before the norm."""
        self._check(tokens, caches)
        ids = np.concatenate([np.asarray(part, np.int64) for part in tokens])
        lengths = np.array([len(part) for part in tokens])
        with threads.exclusive() as count:
            for cache, length in zip(caches, lengths, strict=True):
                cache.reserve(int(length))
            starts = np.array([cache.offset for cache in caches])
            sequences = np.repeat(np.arange(len(caches)), lengths)
            ends = np.cumsum(lengths)
            positions = np.arange(len(ids)) + np.repeat(starts - (ends - lengths), lengths)
            chosen = {"last": ends - 1, "all": np.arange(len(ids)), "hidden": ends[:0]}[want]
            states = np.empty((len(ids), self.config.hidden_size), np.float32) if want == "hidden" else None
            y = self._rows(ids, sequences, positions, chosen, caches, count, states)
            for cache, length in zip(caches, lengths, strict=True):
                cache.offset += int(length)
        return y if states is None else states, ends

    def _check(self, tokens: Sequence[Sequence[int]], caches: Sequence[KVCache]) -> None:
        vocabulary = self.config.vocab_size
        if len(tokens) != len(caches) or len({id(cache) for cache in caches}) != len(caches) or not caches:
            raise BackendError(
                f"[cpu] {len(tokens)} sequences came with {len(caches)} caches; each sequence needs a cache of its own"
            )
        for i, part in enumerate(tokens):
            if not len(part):
                raise BackendError(f"[cpu] sequence {i} has no tokens; at least one is needed; leave the sequence out")
            low, high = min(part), max(part)
            if low < 0 or high >= vocabulary:
                raise BackendError(
                    f"[cpu] sequence {i} holds token {low if low < 0 else high}; 0 to {vocabulary - 1} are in the "
                    "vocabulary; check that the tokenizer belongs to the model"
                )

    def _rows(
        self, ids: np.ndarray, sequences: np.ndarray, positions: np.ndarray, chosen: np.ndarray,
        caches: Sequence[KVCache], count: int, states: np.ndarray | None,
    ) -> np.ndarray:  # fmt: skip
        """Run all rows, a chunk at a time: logits float32 [chosen, vocab]. states: where the last layer's output goes."""
        state, hidden = self._state, self.config.hidden_size
        self._reach(int(positions.max()) + 1)
        y = np.empty((len(chosen), self.weights.lm_head.shape[0]), np.float32)
        table = np.stack([cache.row for cache in caches])
        state[at.CACHES], state[at.THREADS] = address(table), count
        done = 0
        for first in range(0, len(ids), at.CHUNK):
            part = slice(first, first + at.CHUNK)
            place, sequence = positions[part], sequences[part]
            rows = len(place)
            self._buffers.fit(state, rows, int(place.max()) + 1, count)
            x = _floats_at(self._buffers.block, int(state[at.X]), rows, padded(hidden))
            x[:, :hidden] = self.weights.embed_tokens.rows(ids[part])
            here = chosen[done : np.searchsorted(chosen, first + rows)] - first
            state[at.ROWS], state[at.TOKENS] = rows, 8 if rows >= at.PANEL_FROM else 1
            state[at.TEAM] = self._team(rows, count)
            state[at.POSITIONS], state[at.SEQUENCES] = address(place), address(sequence)
            state[at.CHOSEN], state[at.CHOSEN_ROWS] = address(here), len(here)
            state[at.LOGITS] = address(y[done:]) if len(here) else 0
            self._compiled(address(state))
            if states is not None:
                states[part] = x[:, :hidden]
            done += len(here)
        return y

    def _team(self, rows: int, count: int) -> int:
        """How many query heads one item of attention takes: all that share keys, fewer where threads would idle."""
        team = self.config.groups
        while team % 2 == 0 and rows * self.config.num_attention_heads // team < at.TEAMS * count:
            team //= 2
        return team

    def _reach(self, positions: int) -> None:
        """Make the tables of cosines and sines cover `positions` positions."""
        have = len(self._cos)
        if positions > have:
            more = max(positions, 2 * have, 256) - have
            cos, sin = cos_sin(self._inverse, self._rope_factor, have, more)
            self._cos, self._sin = np.concatenate([self._cos, cos]), np.concatenate([self._sin, sin])
            self._state[at.COS], self._state[at.SIN] = address(self._cos), address(self._sin)


def _floats_at(block: np.ndarray, where: int, rows: int, width: int) -> np.ndarray:
    """A float32 view [rows, width] of the part of `block` (bytes) that begins at an address."""
    first = where - address(block)
    return block[first : first + rows * width * 4].view(np.float32).reshape(rows, width)
