"""One text in the making: what was asked, how far it is, and what each new token adds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitnet_mlx.generation.sampling import Sampler, SamplingConfig, log_softmax
from bitnet_mlx.generation.stops import StopStrings
from bitnet_mlx.generation.stream import token_text
from bitnet_mlx.serve.failures import ApiError
from bitnet_mlx.tokenizer import Detokenizer, Tokenizer


@dataclass(frozen=True)
class Task:
    """A text that is asked for, checked: its prompt fits, and max_tokens is what may follow it.

    top: how many alternatives to tell with each token's log probability; None tells none.
    """

    ids: Sequence[int]
    max_tokens: int
    sampling: SamplingConfig
    stop: Sequence[str] = ()
    top: int | None = None

    @property
    def positions(self) -> int:
        """Cache positions that it can come to need: the last token is never fed."""
        return len(self.ids) + self.max_tokens - 1


@dataclass(frozen=True)
class Piece:
    """What one token adds. text may be empty. ended: the token is the model's end of text, which has no text.

    logprob and top (id, log probability; most likely first): after bias and penalties, before temperature and filters.
    """

    text: str
    token: int
    finish_reason: str | None = None
    ended: bool = False
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()


Listener = Callable[["Work", "Piece | ApiError"], None]


class Work:
    """A task on its way through the engine. `cancelled` may be set by any thread; the rest is the engine's.

    history: the prompt's ids and the generated ones, of which the cache holds the first `cache.offset`.
    """

    def __init__(
        self, task: Task, index: int, tokenizer: Tokenizer, stop_ids: frozenset[int], listener: Listener
    ) -> None:
        self.task, self.index = task, index
        self.cancelled = False
        self.cache: Any = None
        self.history = list(task.ids)
        self.cached = 0  # tokens of the prompt that were not computed for this text
        self.kept = 0  # whole blocks of it that were offered to the beginnings that are kept
        self.rank: tuple[int, int] = (0, 0)  # the order of the queue
        self.arrived = self.first_token = 0.0  # seconds of time.monotonic()
        self.deadline = float("inf")  # likewise
        self._listener, self._stop_ids = listener, stop_ids
        self._sampler = Sampler(task.sampling)
        self._stops = StopStrings(task.stop)
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=True)

    @property
    def waiting(self) -> int:
        """How many ids are to be fed before the next token can be chosen."""
        return len(self.history) - self.cache.offset

    @property
    def generated(self) -> int:
        """Tokens made so far."""
        return len(self.history) - len(self.task.ids)

    def tell(self, event: Piece | ApiError) -> None:
        """Hand an event to whoever asked."""
        if not self.cancelled:
            self._listener(self, event)

    def choose(self, logits: np.ndarray) -> Piece:
        """Choose the next token from float32 logits [vocab], and add it."""
        scores = self._sampler.scores(logits, self.history, len(self.task.ids))
        token = self._sampler.pick(scores)
        self.history.append(token)
        ended = token in self._stop_ids
        last = self.generated == self.task.max_tokens
        text, finish = token_text(token, last, self._stop_ids, self._detokenizer, self._stops)
        if self.task.top is None or ended:
            return Piece(text, token, finish, ended)
        logprobs = log_softmax(scores)
        return Piece(text, token, finish, ended, float(logprobs[token]), _best(logprobs, self.task.top))


def _best(logprobs: np.ndarray, count: int) -> list[tuple[int, float]]:
    """The `count` most likely ids, most likely first, of equals the lowest first."""
    count = min(count, len(logprobs))
    if not count:
        return []
    least = np.partition(logprobs, len(logprobs) - count)[len(logprobs) - count]
    ids = np.flatnonzero(logprobs >= least)
    ids = ids[np.argsort(-logprobs[ids], kind="stable")[:count]]
    return [(int(i), float(logprobs[i])) for i in ids]
