"""Where the loop gets the next logits from: one step a token, or guesses that one step checks together.

A guess is right when the sampler, with the same logits, the same history and the same draw as ever, chooses that token. So
the text is the one that comes without guesses: bit for bit on engines whose rows do not depend on what is computed beside
them (cpu, numpy); on MLX up to the rounding of its sums, where two tokens are all but equal.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from bitnet_mlx.generation.draft_length import DraftLength, Verification
from bitnet_mlx.generation.drafting import Drafter
from bitnet_mlx.generation.sampling import Sampler
from bitnet_mlx.models.decoder import Decoder

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SpeculationReport:
    """What guessing gave. acceptance: accepted / drafted. verifications: steps that checked guesses. off: why it ended,
    or None. gain: tokens a second against plain steps, of the last verifications; None where that was not measured.
    """

    drafter: str
    drafted: int
    accepted: int
    acceptance: float
    verifications: int
    off: str | None
    gain: float | None

    def record(self) -> dict[str, Any]:
        """The fields by name, for JSON."""
        return asdict(self)


class Steps(Protocol):
    """Logits after a token, each once, in the text's order."""

    def chosen(self, token: int) -> bool:
        """The token that follows is chosen; whether it had been guessed."""
        ...

    def logits(self, history: Sequence[int]) -> np.ndarray:
        """Float32 logits [vocab] after the last token of history, the one chosen."""
        ...

    def finish(self) -> SpeculationReport | None:
        """The text is at its end: the cache holds what it would hold without guesses."""
        ...


class PlainSteps:
    """One step a token."""

    def __init__(self, decoder: Decoder, cache: Any) -> None:
        self._decoder, self._cache = decoder, cache

    def chosen(self, token: int) -> bool:  # noqa: ARG002
        return False

    def logits(self, history: Sequence[int]) -> np.ndarray:
        return self._decoder.step([history[-1:]], [self._cache])[0]

    def finish(self) -> None:
        return None


@dataclass
class _Batch:
    """Guesses that one step has checked. row: whose logits were handed out last; rows[i] follow after the first i guesses.

    base: positions of the cache before the step. matched: the token chosen from that row is the guess.
    """

    kind: Hashable
    guesses: list[int]
    rows: np.ndarray
    base: int
    step_s: float
    draft_s: float
    row: int = 0
    matched: bool = False


class SpeculativeSteps:
    """Guesses where that pays. limit: the text's length in tokens that is never passed, its prompt counted. tell: log the
    end of guessing. drafted: guesses that were checked so far.
    """

    def __init__(
        self, decoder: Decoder, cache: Any, drafter: Drafter, length: DraftLength, sampler: Sampler,
        prompt: Sequence[int], limit: int, tell: bool = True,
    ) -> None:  # fmt: skip
        self._decoder, self._cache = decoder, cache
        self._drafter, self._length, self._sampler = drafter, length, sampler
        self._prompt_tokens, self._limit = len(prompt), limit
        self._batch: _Batch | None = None
        self._unused: tuple[Hashable, int] | None = None  # what would have been guessed, where that did not pay
        self._told = not tell
        self.drafted = self._accepted = self._verifications = 0
        drafter.begin(prompt)

    def chosen(self, token: int) -> bool:
        batch = self._batch
        if self._unused is not None:
            kind, guess = self._unused
            self._unused = None
            self._length.learn(kind, guess == token, guess != token)
        if batch is None:
            return False
        batch.matched = batch.row < len(batch.guesses) and batch.guesses[batch.row] == token
        if not batch.matched:
            self._settle(batch)
        return batch.matched

    def logits(self, history: Sequence[int]) -> np.ndarray:
        if self._batch is not None:
            self._batch.row += 1
            self._batch.matched = False
            return self._batch.rows[self._batch.row]
        start = time.perf_counter()
        kind, guesses = self._guesses(history)
        drafted = time.perf_counter()
        if not guesses:
            row = self._decoder.step([history[-1:]], [self._cache])[0]
            self._length.plain(time.perf_counter() - drafted)
            return row
        base = self._cache.offset
        rows = self._decoder.step([[history[-1], *guesses]], [self._cache], logits="all")[0]
        step_s = time.perf_counter() - drafted
        self._batch = _Batch(kind, guesses, rows, base, step_s, drafted - start)
        return rows[0]

    def _guesses(self, history: Sequence[int]) -> tuple[Hashable, list[int]]:
        kind = None if self._length.off else self._drafter.kind(history)
        if kind is None:
            return None, []
        # The step gives one token more than are guessed, and all of them must still be wanted.
        count = self._length.choose(kind, self._limit - len(history) - 1)
        self._tell_end()
        if not count and not self._drafter.free:
            return kind, []
        guesses = self._drafter.draft(history, max(count, 1), self._prompt_tokens, self._sampler)
        if not count:
            self._unused = (kind, guesses[0])
        return kind, guesses[:count]

    def finish(self) -> SpeculationReport:
        if self._batch is not None:
            self._settle(self._batch)
        share = self._accepted / max(self.drafted, 1)
        return SpeculationReport(
            self._drafter.name, self.drafted, self._accepted, share, self._verifications, self._length.off,
            self._length.gain,
        )  # fmt: skip

    def _settle(self, batch: _Batch) -> None:
        """Forget the guesses that did not come true. The cache keeps the tokens that the text has, but for its last."""
        self._batch = None
        self._cache.trim(batch.base + 1 + batch.row)
        accepted = batch.row + batch.matched
        self.drafted += len(batch.guesses)
        self._accepted += accepted
        self._verifications += 1
        self._length.verified(Verification(batch.kind, len(batch.guesses), accepted, batch.step_s, batch.draft_s))
        self._tell_end()

    def _tell_end(self) -> None:
        if self._length.off and not self._told:
            self._told = True
            _log.info("[speculate] %s is off from here on: %s", self._drafter.name, self._length.off)
