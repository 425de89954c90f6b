"""One text in the making: what was asked, how far it is, and what each new token adds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from bitnet_mlx.generation.grammar import Grammar
from bitnet_mlx.generation.sampling import Sampler, SamplingConfig, log_softmax
from bitnet_mlx.generation.stops import StopStrings
from bitnet_mlx.generation.stream import token_text
from bitnet_mlx.serve.failures import ApiError
from bitnet_mlx.tokenizer import Detokenizer, Tokenizer


@dataclass(frozen=True)
class Task:
    """A text that is asked for, checked: its prompt fits, and max_tokens is what may follow it (0 for nothing).

    top: how many alternatives to tell with each token's log probability; None tells none. grammar: what the text must be.
    echo: the prompt's own tokens are told first. shown: special tokens that belong to the text.
    """

    ids: Sequence[int]
    max_tokens: int
    sampling: SamplingConfig
    stop: Sequence[str] = ()
    top: int | None = None
    grammar: Grammar | None = None
    echo: bool = False
    shown: frozenset[int] = frozenset()

    @property
    def positions(self) -> int:
        """Cache positions that it can come to need: the last token is never fed."""
        return len(self.ids) + max(self.max_tokens - 1, 0)

    def begin(self, index: int, tokenizer: Tokenizer, stop_ids: frozenset[int], listener: Listener) -> Work:
        """Its work, to be done by the engine."""
        return Work(self, index, tokenizer, stop_ids, listener)


@dataclass(frozen=True)
class Piece:
    """What one token adds. text may be empty. ended: the token is the model's end of text, which has no text.

    logprob and top (id, log probability; most likely first): after bias and penalties, before grammar, temperature and
    filters.
    """

    text: str
    token: int
    finish_reason: str | None = None
    ended: bool = False
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()


@dataclass(frozen=True)
class Echo:
    """The prompt's tokens; the first has no log probability. finish_reason: "length" where nothing is to follow."""

    pieces: Sequence[Piece]
    finish_reason: str | None = None

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


@dataclass(frozen=True)
class Vector:
    """What a text that was only read comes to: float32 [hidden]."""

    values: np.ndarray
    finish_reason: str | None = "stop"


Event = Piece | Echo | Vector
Listener = Callable[["Work", "Event | ApiError"], None]
Want = Literal["last", "all", "hidden"]
WANTS: tuple[Want, ...] = ("last", "all", "hidden")


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
        self._tokenizer = tokenizer
        self._listener, self._stop_ids = listener, stop_ids
        self.sampler = Sampler(task.sampling, task.grammar.begin() if task.grammar else None)
        self._stops = StopStrings(task.stop)
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=True, shown=task.shown)
        self._told: list[tuple[float | None, Sequence[tuple[int, float]]]] = [(None, ())]  # of the prompt's tokens

    @property
    def waiting(self) -> int:
        """How many ids are to be fed before the next token can be chosen."""
        return len(self.history) - self.cache.offset

    @property
    def generated(self) -> int:
        """Tokens made so far."""
        return len(self.history) - len(self.task.ids)

    @property
    def want(self) -> Want:
        """What the next step must give: logits after the last token or after all, or hidden states."""
        prompt = self.task.echo and self.task.top is not None and not self.generated
        return "all" if prompt else "last"

    @property
    def shares(self) -> bool:
        """Whether it may take over what another text has computed: not where every token's row is wanted."""
        return self.want == "last"

    def tell(self, event: Event | ApiError) -> None:
        """Hand an event to whoever asked."""
        if not self.cancelled:
            self._listener(self, event)

    def take(self, rows: np.ndarray) -> list[Event]:
        """What a step gave, as `want` said: logits [vocab] or [length, vocab]. The events that come of it.

        Nothing is chosen while ids wait to be fed.
        """
        if self.want == "all":
            self._rate_prompt(rows)
            rows = rows[-1]
        if self.waiting:
            return []
        events: list[Event] = []
        if self.task.echo and not self.generated:
            events.append(self._echo())
        return [*events, self.choose(rows)] if self.task.max_tokens else events

    def _rate_prompt(self, rows: np.ndarray) -> None:
        """Log probabilities of the prompt's tokens that follow those just fed."""
        end = self.cache.offset
        for token, logits in zip(self.task.ids[end - len(rows) + 1 : end + 1], rows, strict=False):
            logprobs = log_softmax(np.asarray(logits, np.float32))
            self._told.append((float(logprobs[token]), _best(logprobs, self.task.top or 0)))

    def _echo(self) -> Echo:
        """The prompt as text, token by token, but for a beginning that the tokenizer adds."""
        ids, begins = self.task.ids, self._tokenizer.bos_token_id
        whole = Detokenizer(self._tokenizer, skip_special_tokens=False)
        told = self._told if self.task.top is not None else [(None, ())] * len(ids)
        pieces = []
        for at, (token, (logprob, top)) in enumerate(zip(ids, told, strict=True)):
            text = "" if at == 0 and token == begins else whole.add(token)
            pieces.append(Piece(text, token, logprob=logprob, top=top))
            self._detokenizer.add(token)  # what is generated goes on where the prompt ends
        if self.task.max_tokens:
            return Echo(pieces)
        return Echo([*pieces[:-1], replace(pieces[-1], text=pieces[-1].text + whole.finalize())], "length")

    def choose(self, logits: np.ndarray) -> Piece:
        """Choose the next token from float32 logits [vocab], and add it."""
        scores = self.sampler.scores(logits, self.history, len(self.task.ids))
        token = self.sampler.pick(scores)
        self.history.append(token)
        ended = token in self._stop_ids
        last = self.generated == self.task.max_tokens
        complete = self.sampler.complete
        text, finish = token_text(token, last, self._stop_ids, self._detokenizer, self._stops, complete)
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
