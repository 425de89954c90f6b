"""Continuous batching: one thread that runs the model, texts that join and leave between its steps.

Each step feeds one new token of every text that is being written, and the next part of the prompts of those that have just
come: together at most STEP_TOKENS, so that a long prompt delays nobody by more than a step. Prompts share what a step has
left evenly, so a short one is through in a step or two whatever is beside it. Beginnings that texts have in common are
computed once (prefixes.py); who comes when is schedule.py's.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bitnet_mlx.errors import BitnetError
from bitnet_mlx.generation.speculation import Speculation
from bitnet_mlx.generation.steps import SpeculativeSteps
from bitnet_mlx.memory.show import size
from bitnet_mlx.models.decoder import Decoder
from bitnet_mlx.models.demand import kv_of
from bitnet_mlx.serve.failures import ApiError
from bitnet_mlx.serve.prefixes import BLOCK, Prefixes
from bitnet_mlx.serve.schedule import Queue, share
from bitnet_mlx.serve.work import WANTS, Event, Listener, Piece, Task, Work
from bitnet_mlx.tokenizer import Tokenizer

log = logging.getLogger(__name__)

STEP_TOKENS = 256  # the cpu engine takes as many rows at a time
_RECENT = 32  # finished texts that the time to wait is judged by


@dataclass(frozen=True)
class Limits:
    """running: texts in one batch. waiting: texts in the queue. kv_bytes: keys and values of all that run, each counted as
    long as it may become. prefix_bytes: beginnings that are kept, 0 for none. seconds: from a text's arrival to its end.
    """

    running: int = 16
    waiting: int = 64
    kv_bytes: int = 1 << 30
    prefix_bytes: int = 0
    step_tokens: int = STEP_TOKENS
    seconds: float = math.inf


@dataclass(frozen=True)
class Counts:
    """What the engine has done since its start, and holds now."""

    steps: int = 0
    step_seconds: float = 0.0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    timed_out: int = 0
    cached_tokens: int = 0
    running: int = 0
    waiting: int = 0
    kv_bytes: int = 0
    prefix_bytes: int = 0
    prefix_blocks: int = 0
    prefix_evicted: int = 0


class Engine:
    """The model and its thread. `submit` and `cancel` may be called from any thread; listeners are called on the engine's."""

    def __init__(
        self, decoder: Decoder, tokenizer: Tokenizer, limits: Limits | None = None, speculation: Speculation | None = None
    ) -> None:  # fmt: skip
        """speculation: guesses for a text that is written alone; beside others their rows are the better use of a step."""
        self._speculation = speculation
        self._ahead: tuple[Work, SpeculativeSteps] | None = None  # of the text that was alone last
        self.decoder, self.tokenizer, self.limits = decoder, tokenizer, limits or Limits()
        self._stop_ids = tokenizer.eos_token_ids | frozenset(decoder.config.eos_token_ids)
        self._kv_bytes = kv_of(decoder)
        self._prefixes = Prefixes(self.limits.prefix_bytes)
        self._queue = Queue()
        self._running: list[Work] = []
        self._change = threading.Condition()
        self._stopping = False
        self._tally: Counter[str] = Counter()  # fields of Counts
        self._finished_at: deque[float] = deque(maxlen=_RECENT)
        self._thread = threading.Thread(target=self._run, name="bitnet-mlx engine", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self) -> None:
        """End after the step in progress; what is not finished fails."""
        with self._change:
            self._stopping = True
            self._change.notify()
        self._thread.join()

    @property
    def counts(self) -> Counts:
        """A snapshot."""
        with self._change:
            held = sum(w.cache.nbytes for w in self._running if w.cache is not None)
            kept = self._prefixes
            return Counts(
                **{**self._tally, "running": len(self._running), "waiting": len(self._queue), "kv_bytes": held,
                "prefix_bytes": kept.nbytes, "prefix_blocks": len(kept), "prefix_evicted": kept.evicted},
            )  # fmt: skip

    def submit(self, tasks: Sequence[Task], listener: Listener) -> list[Work]:
        """Queue texts, all or none. Raises ApiError 429 when the queue is full, 400 for what can never run, 503 at the end."""
        limits = self.limits
        for task in tasks:
            need = self._need(task)
            if need > limits.kv_bytes:
                raise ApiError(
                    400, f"{task.positions} positions of cache would take {size(need)} and this server has "
                    f"{size(limits.kv_bytes)}; shorten the prompt or ask for fewer tokens", code="context_length_exceeded",
                )  # fmt: skip
        if len(tasks) > limits.waiting:
            raise ApiError(
                400, f"{len(tasks)} texts were asked for at once; at most {limits.waiting} are allowed", param="n"
            )
        works = [task.begin(index, self.tokenizer, self._stop_ids, listener) for index, task in enumerate(tasks)]
        with self._change:
            if self._stopping:
                raise ApiError(503, "The server is shutting down", code="shutting_down")
            free = limits.running - len(self._running)  # those who come while a step runs do not wait for long
            if len(self._queue) + len(works) > limits.waiting + free:
                seconds = self._wait_for(len(works))
                raise ApiError(
                    429, f"The queue is full ({len(self._queue)} texts wait); try again in {seconds} s", code="queue_full",
                    headers={"Retry-After": str(seconds)},
                )  # fmt: skip
            for work in works:
                work.arrived = time.monotonic()
                work.deadline = work.arrived + limits.seconds
            self._queue.add(works)
            self._change.notify()
        return works

    def cancel(self, works: Sequence[Work]) -> None:
        """Stop texts that nobody waits for any more: before the next step. Finished ones stay as they are."""
        for work in works:
            work.cancelled = True
        with self._change:
            self._change.notify()

    def _need(self, task: Task) -> int:
        """Bytes of cache that a text can come to need."""
        return self._kv_bytes(task.positions, 1)

    def _wait_for(self, places: int) -> int:
        """Seconds after which so many places may be free, from the rate of late."""
        if len(self._finished_at) < 2:
            return 1
        span = time.monotonic() - self._finished_at[0]
        return max(1, min(60, round(places * span / len(self._finished_at))))

    def _run(self) -> None:
        while self._next():
            try:
                self._step()
            except Exception as error:  # whatever happens, the next request finds an engine
                log.error("[serve] a step failed: %s: %s", type(error).__name__, error)
                for work in list(self._running):
                    self._fail(work, error)
        for work in [*self._running, *self._queue]:
            work.tell(ApiError(503, "The server is shutting down", code="shutting_down"))
        with self._change:
            self._running.clear()
            self._queue = Queue()

    def _next(self) -> bool:
        """Wait for work, let go of what was cancelled, let in what fits. False: it is time to end."""
        with self._change:
            while True:
                self._drop()
                self._admit()
                if self._stopping:
                    return False
                if self._running:
                    return True
                self._change.wait()

    def _drop(self) -> None:
        """Let go of what nobody waits for, and of what has taken too long."""
        now = time.monotonic()
        gone = [*filter(_unwanted(now), self._running), *self._queue.take_out(_unwanted(now))]
        self._running = [work for work in self._running if work not in gone]
        if self._ahead is not None and self._ahead[0] in gone:
            self._ahead = None
        for work in gone:
            work.cache = None
            if not work.cancelled:
                text = f"The answer was not complete after {self.limits.seconds:g} s; ask for fewer tokens"
                work.tell(ApiError(504, text, code="timeout"))
        left = sum(work.cancelled for work in gone)
        if gone:
            self._count(cancelled=left, timed_out=len(gone) - left)

    def _admit(self) -> None:
        """In the queue's order: the first that does not fit holds up those behind it."""
        used = sum(self._need(work.task) for work in self._running)
        while len(self._running) < self.limits.running:
            work = self._queue.first()
            used += 0 if work is None else self._need(work.task)
            if work is None or used > self.limits.kv_bytes:
                return
            self._running.append(self._queue.pop())

    def _step(self) -> None:
        began = time.monotonic()
        for work in list(self._running):
            if not work.generated:
                self._guarded(work, lambda work=work: self._prepare(work))
        alone = self._alone()
        if alone is not None:
            self._guarded(alone, lambda: self._look_ahead(alone))
            self._stepped(began, 0)
            return
        parts = share(self._running, self.limits.step_tokens, bool(self.limits.prefix_bytes))
        outputs = [out for want in WANTS for out in self._compute([part for part in parts if part[0].want == want])]
        fed = 0
        for work, tokens, rows in outputs:
            if not work.generated:
                fed += len(tokens)
            self._guarded(work, lambda work=work: self._keep(work))
            if work.cache is not None:
                self._guarded(work, lambda work=work, rows=rows: self._advance(work, rows))
        self._stepped(began, fed)

    def _stepped(self, began: float, fed: int) -> None:
        with self._change:
            self._count(steps=1, prompt_tokens=fed, step_seconds=time.monotonic() - began)

    def _alone(self) -> Work | None:
        """The only text there is, where it is being written and guesses are allowed."""
        if self._speculation is None or len(self._running) != 1:
            return None
        work = self._running[0]
        return work if work.generated and work.waiting == 1 and work.want == "last" else None

    def _look_ahead(self, work: Work) -> None:
        """One step that may check guesses: as many tokens as come true, and the one after them."""
        assert self._speculation is not None
        if self._ahead is None or self._ahead[0] is not work:
            task = work.task
            self._ahead = work, self._speculation.steps(work.cache, work.sampler, task.ids, task.positions + 1)
        steps, more = self._ahead[1], True
        before = steps.drafted
        while more:
            piece = work.choose(steps.logits(work.history))
            drafted = steps.chosen(piece.token)
            more = drafted and not piece.finish_reason and not work.cancelled
            if not more:
                steps.finish()  # the cache holds what it would without guesses
                self._keep(work)
                with self._change:
                    self._count(drafted_tokens=steps.drafted - before)
            with self._change:
                self._count(accepted_tokens=int(drafted))
            self._tell(work, piece)

    def _prepare(self, work: Work) -> None:
        """Make the cache, and take over what is kept of the prompt's beginning."""
        if work.cache is None:
            work.cache = self.decoder.make_cache(work.task.positions)
        if self.limits.prefix_bytes and work.shares:
            gained = self._prefixes.restore(work.task.ids, work.cache)
            work.cached += gained
            with self._change:
                self._count(cached_tokens=gained)

    def _keep(self, work: Work) -> None:
        """Keep what the text has filled, whenever that is a block more."""
        blocks = work.cache.offset // BLOCK
        if self.limits.prefix_bytes and blocks > work.kept:
            self._prefixes.keep(work.history, work.cache)
            work.kept = blocks

    def _compute(self, parts: Sequence[tuple[Work, list[int]]]) -> list[tuple[Work, list[int], np.ndarray]]:
        """Feed parts that want the same in one step. Where that fails each goes alone, so that only the one at fault fails."""
        if not parts:
            return []
        offsets = [work.cache.offset for work, _ in parts]
        try:
            want = parts[0][0].want
            given = [tokens for _, tokens in parts], [work.cache for work, _ in parts]
            rows = self.decoder.hidden(*given) if want == "hidden" else self.decoder.step(*given, want)
            return [(work, tokens, row) for (work, tokens), row in zip(parts, rows, strict=True)]
        except Exception as error:  # a decoder may fail in any way
            if len(parts) == 1:
                self._fail(parts[0][0], error)
                return []
            log.warning("[serve] a step of %d texts failed (%s); each goes alone", len(parts), error)
            for (work, _), offset in zip(parts, offsets, strict=True):
                work.cache.trim(offset)
        return [output for part in parts for output in self._compute([part])]

    def _advance(self, work: Work, rows: np.ndarray) -> None:
        for event in work.take(rows):
            if work.generated == 1:
                work.first_token = time.monotonic()
            self._tell(work, event)

    def _tell(self, work: Work, event: Event) -> None:
        with self._change:
            self._count(generated_tokens=isinstance(event, Piece))
            if event.finish_reason:
                self._leave(work, finished=1)
        work.tell(event)

    def _guarded(self, work: Work, action: Callable[[], None]) -> None:
        """One text's own trouble is nobody else's."""
        try:
            action()
        except Exception as error:  # as above
            self._fail(work, error)

    def _fail(self, work: Work, error: Exception) -> None:
        log.error("[serve] a request failed: %s: %s", type(error).__name__, error)
        with self._change:
            self._leave(work, failed=1)
        told = str(error) if isinstance(error, BitnetError) else f"unexpected {type(error).__name__}"
        work.tell(ApiError(500, f"The engine failed: {told}", code="engine_error"))

    def _leave(self, work: Work, **count: float) -> None:
        if work in self._running:
            self._running.remove(work)
            self._finished_at.append(time.monotonic())
            self._count(**count)
        work.cache = None
        if self._ahead is not None and self._ahead[0] is work:
            self._ahead = None

    def _count(self, **more: float) -> None:
        for name, value in more.items():
            self._tally[name] += value  # type: ignore[assignment]


def _unwanted(now: float) -> Callable[[Work], bool]:
    return lambda work: work.cancelled or work.deadline <= now
