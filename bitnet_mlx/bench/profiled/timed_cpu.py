"""The cpu decoder: its compiled step notes when each job ends, and those times become spans."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bitnet_mlx.backends.cpu_jit import clock
from bitnet_mlx.backends.cpu_jit import layout as at
from bitnet_mlx.bench.profiled.engine import cache_traffic, weight_traffic
from bitnet_mlx.errors import BackendError
from bitnet_mlx.models.cache import KVCache
from bitnet_mlx.profile.spans import Recorder

_PART = {
    at.ENTER: "host", at.PREPARE: "norm", at.QKV: "qkv", at.ROTATE: "attention", at.ATTEND: "attention", at.OUT: "o",
    at.GATE_UP: "gate_up", at.GATED: "gate_up", at.DOWN: "down", at.FINAL_NORM: "norm", at.HEAD: "head",
}  # fmt: skip
_PART.update(
    (job + at.MARK_WHICH * which, part)
    for job in (at.SINGLE, at.DOWN_RANK)
    for which, part in enumerate(("qkv", "qkv", "qkv", "o", "gate_up", "gate_up", "down"))
)
_JOBS = 29  # of a layer at most: where each linear has a norm of its own, and an adapter
_OUTSIDE = 3  # the entry, the last norm, the head


class TimedCpu:
    """The embedding's row is looked up by Python and counts to "host"."""

    launch_kind = "jobs of the compiled step"

    def __init__(self, decoder: Any) -> None:
        if not clock.available:
            raise BackendError(
                "[profile] the cpu engine cannot be profiled on Windows, whose C library lacks the clock; use --backend numpy"
            )
        self._decoder = decoder
        self.recorder = Recorder(clock.now)
        self._jobs = 0
        self._room = np.empty((0, at.MARK_FIELDS), np.int64)

    def step(self, ids: Sequence[int], cache: KVCache) -> np.ndarray:
        """See Timed."""
        layers = self._decoder.config.num_hidden_layers
        needed = (layers * _JOBS + _OUTSIDE) * -(-len(ids) // at.CHUNK)
        if len(self._room) < needed:
            self._room = np.empty((needed, at.MARK_FIELDS), np.int64)
        self._decoder.mark_jobs(self._room)
        self.recorder.resume()
        try:
            logits = self._decoder.step([ids], [cache])[0]
            end = clock.now()
        finally:
            noted = self._room[: self._decoder.jobs_marked].copy()
            self._decoder.mark_jobs(None)
        self.recorder.mark_later(lambda: _marks(noted, layers))
        self.recorder.mark_at(end, "host")
        self.recorder.resume()
        self._jobs = len(noted) - -(-len(ids) // at.CHUNK)  # each call of the step notes its entry as well
        return logits

    def launches(self) -> int:
        """See Timed."""
        return self._jobs

    def traffic(self, tokens: int, positions: int) -> dict[str, int]:
        """See Timed."""
        found = weight_traffic(self._decoder.weights, tokens)
        found["attention"] = cache_traffic(self._decoder.config, tokens, positions, 4)
        del found["embedding"]  # a row, looked up by the host
        return found


def _marks(noted: np.ndarray, layers: int) -> Iterator[tuple[int, str, int | None, int]]:
    """int64 [jobs, 3] of cpu_jit.marks as marks of a recorder."""
    for job, layer, when in noted.tolist():
        yield when, _PART[job], layer if job != at.ENTER and layer < layers else None, 0
