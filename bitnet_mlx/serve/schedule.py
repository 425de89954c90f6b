"""Who comes next: the queue of texts, and what each running text is fed in a step."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator, Sequence

from bitnet_mlx.serve.prefixes import next_block
from bitnet_mlx.serve.work import Work

_LEAST_PROMPT = 32  # prompt tokens of a step, however many texts are being written


class Queue:
    """Texts that wait, first come first served, but the k-th text of one request counts as if k requests later: a request
    of many texts delays others little, and nobody can wait for ever."""

    def __init__(self) -> None:
        self._waiting: list[Work] = []
        self._requests = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Work]:
        return iter(self._waiting)

    def add(self, works: Sequence[Work]) -> None:
        """The texts of one request."""
        self._requests += 1
        for index, work in enumerate(works):
            work.rank = (self._requests + index, self._requests)
            insort(self._waiting, work, key=lambda w: w.rank)

    def first(self) -> Work | None:
        """The next one, which stays."""
        return self._waiting[0] if self._waiting else None

    def pop(self) -> Work:
        """Take the next one."""
        return self._waiting.pop(0)

    def take_out(self, unwanted: Callable[[Work], bool]) -> list[Work]:
        """Remove some, and return them."""
        gone = [work for work in self._waiting if unwanted(work)]
        if gone:
            self._waiting = [work for work in self._waiting if not unwanted(work)]
        return gone


def share(works: Sequence[Work], step_tokens: int, sharing: bool = False) -> list[tuple[Work, list[int]]]:
    """(text, ids to feed next): one id of each that is being written; the prompts share what is left, the short ones first.

    A prompt that gets nothing now is left out. sharing: beginnings are kept, so of prompts that go on alike one is fed and
    the others wait for what it computes.
    """
    parts = [(work, work.history[-1:]) for work in works if work.waiting == 1]
    prompts = [work for work in works if work.waiting > 1]
    if sharing:
        prompts = [*leaders([work for work in prompts if work.shares]), *(work for work in prompts if not work.shares)]
    prompts.sort(key=lambda work: work.waiting)
    room = max(step_tokens - len(parts), _LEAST_PROMPT)
    for place, work in enumerate(prompts):
        count = min(work.waiting, max(1, room // (len(prompts) - place)), room)
        if count:
            at = work.cache.offset
            parts.append((work, work.history[at : at + count]))
            room -= count
    return parts


def leaders(prompts: Sequence[Work]) -> list[Work]:
    """Of prompts whose next blocks are the same beginning, the one that is furthest."""
    chosen, seen = [], set()
    for work in sorted(prompts, key=lambda work: -work.cache.offset):
        block = next_block(work.history, work.cache.offset)
        if block is None or block not in seen:
            chosen.append(work)
        if block is not None:
            seen.add(block)
    return chosen
