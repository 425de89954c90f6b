"""How many tokens to guess at once, and when guessing does not pay: from what was measured, before and while it runs.

With a share `a` of right guesses, k of them give 1 + a + ... + a^k tokens on the average, for the time of a step of k + 1
rows and of the guessing. The length with the most tokens a second is taken; where none beats a plain step, none is guessed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Hashable
from dataclasses import dataclass
from statistics import median

from bitnet_mlx.generation.row_times import RowTimes

MOST = 15
_PRIOR = (3.0, 4.0)  # guesses that were right, of how many, before there were any
_FADES = 0.97  # weight of all earlier guesses after each verification
_WINDOW = 32  # verifications that the verdict looks back on
_LEAST = 12  # and how many there must be
_PLAIN_EVERY = 16  # verifications after which a plain step is made, to know its time
_FEW = 4  # plain steps until which they come twice as often
_REFUSED = 24  # plain steps in a row, because no length pays, after which a drafter that costs time is not asked again
_LIVE = 5  # measured steps from which on their mean stands for what was measured before
_PAUSE = 10.0  # times a plain step's median that one step counts at most: a machine pauses now and then
_LOSSES = 6  # verifications in a row after which the last ones had lost time


@dataclass(frozen=True)
class Verification:
    """One step that checked guesses. accepted: of `drafted`; seconds of the step, and of the guessing before it."""

    kind: Hashable
    drafted: int
    accepted: int
    step_s: float
    draft_s: float

    @property
    def tokens(self) -> int:
        """What the step gave: the accepted guesses and the model's own next token."""
        return self.accepted + 1

    @property
    def seconds(self) -> float:
        return self.step_s + self.draft_s


class DraftLength:
    """Chooses the length. fixed: the user's own number, which is kept whatever comes. `off`: why guessing has ended."""

    def __init__(self, times: RowTimes | None, fixed: int | None = None, free: bool = False) -> None:
        """times: may be None where a number is fixed. free: guesses take no time worth counting."""
        assert times is not None or fixed is not None
        self._times, self._fixed, self._free = times, fixed, free
        self._right: dict[Hashable, tuple[float, float]] = {}
        self._window: deque[Verification] = deque(maxlen=_WINDOW)
        self._plain: deque[float] = deque(maxlen=_WINDOW)
        self._live: dict[int, deque[float]] = {}
        self._each: deque[float] = deque(maxlen=_WINDOW)  # seconds of one guess
        self._since_plain = self._refused = self._losses = 0
        self._totals = {"tokens": 0, "seconds": 0.0, "plain": 0, "plain_s": 0.0}
        self.off: str | None = None

    @property
    def gain(self) -> float | None:
        """Tokens a second of the steps that checked guesses against plain ones; None where too little was measured."""
        sums = self._totals
        if sums["plain"] < _FEW or not sums["seconds"]:
            return None
        return sums["tokens"] / sums["seconds"] * sums["plain_s"] / sums["plain"]

    def choose(self, kind: Hashable, most: int) -> int:
        """How many to guess now, at most `most`; 0 for a plain step."""
        if self.off or most < 1:
            return 0
        if self._fixed is not None:
            return min(self._fixed, most)
        if self._since_plain >= (_PLAIN_EVERY if len(self._plain) >= _FEW else _PLAIN_EVERY // 2):
            return 0
        right, of = self._right.get(kind, _PRIOR)
        length = self._best(right / of, most)
        self._refused = 0 if length else self._refused + 1
        if self._refused and (self._free or len(self._each) >= _LIVE) and not self._best(1.0, MOST):
            self._end(
                "even right guesses save no time here: a step that checks them takes as long as the steps it saves"
            )
        elif self._refused >= _REFUSED and not self._free:
            self._end(f"with {right / of:.0%} of the guesses right no number of them pays on this machine")
        return length

    def _best(self, share: float, most: int) -> int:
        """The length with the most tokens a second where this share of guesses is right; 0 where a plain step has more."""
        best, length, tokens = 1.0, 0, 1.0
        for k in range(1, min(MOST, most) + 1):
            tokens += share**k
            speed = tokens / (self._ratio(k + 1) + k * self._guess())
            if speed > best:
                best, length = speed, k
        return length

    def verified(self, seen: Verification) -> None:
        """Learn from a step that checked guesses."""
        self.learn(seen.kind, seen.accepted, seen.accepted < seen.drafted)
        self._window.append(seen)
        self._since_plain += 1
        self._live.setdefault(seen.drafted + 1, deque(maxlen=_WINDOW)).append(seen.step_s)
        if len(self._window) > 1:  # the first may compile
            self._each.append(seen.draft_s / seen.drafted)
        self._totals["tokens"] += seen.tokens
        self._totals["seconds"] += seen.seconds
        if self._fixed is None:
            self._judge()

    def _judge(self) -> None:
        if len(self._window) < _LEAST or len(self._plain) < _FEW:
            return
        tokens = sum(v.tokens for v in self._window) / len(self._window)
        gain = tokens * self._mean(self._plain) / self._mean([v.seconds for v in self._window])
        self._losses = self._losses + 1 if gain < 1 else 0
        if self._losses >= _LOSSES:
            drafted, accepted = sum(v.drafted for v in self._window), sum(v.accepted for v in self._window)
            self._end(f"{accepted} of the last {drafted} guesses were right, {gain:.2f} times the speed without them")

    def learn(self, kind: Hashable, right: int, wrong: bool) -> None:
        """So many guesses in a row were right, and whether one was wrong then; those behind it tell nothing."""
        before, of = self._right.get(kind, _PRIOR)
        self._right[kind] = (before * _FADES + right, of * _FADES + right + wrong)

    def plain(self, seconds: float) -> None:
        """Learn from a step without guesses."""
        self._plain.append(seconds)
        self._totals["plain"] += 1
        self._totals["plain_s"] += seconds
        self._since_plain = 0

    def _end(self, why: str) -> None:
        self.off = self.off or why

    def _ratio(self, rows: int) -> float:
        """A step of so many rows against a plain one: as of late where there is enough of it, else as measured before; never
        more than a step of more rows took of late.
        """
        assert self._times is not None
        live = {more: times for more, times in self._live.items() if more >= rows and len(times) >= _LIVE}
        if len(self._plain) < _LIVE or not live:
            return self._times.ratio(rows)
        found = [self._mean(times) / self._mean(self._plain) for times in live.values()]
        return min(found if rows in live else [*found, self._times.ratio(rows)])

    def _mean(self, seconds: Collection[float]) -> float:
        """Pauses of the machine count no more than _PAUSE plain steps."""
        most = _PAUSE * median(self._plain)
        return sum(min(s, most) for s in seconds) / len(seconds)

    def _guess(self) -> float:
        """One guess against a plain step."""
        if self._free or not self._each:
            return 0.0
        assert self._times is not None
        each = median(self._each) if len(self._each) >= _LIVE else min(self._each)
        return each / (median(self._plain) if self._plain else self._times.one)
