"""Pressure: how near the limit memory is, who is told, and how often."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bitnet_mlx.errors import ConfigError
from bitnet_mlx.memory.records import PressureEvent

LEVELS = ("none", "low", "medium", "high", "critical")
SHARES = (0.70, 0.80, 0.90, 0.95)  # of the limit, where the levels after the first begin
COOLDOWN_S = 30.0
Callback = Callable[[PressureEvent], object]


def level_of(share: float, shares: Sequence[float] = SHARES) -> int:
    """Index into LEVELS; a level begins at its share."""
    return sum(share >= start for start in shares)


class PressureWatch:
    """Call-backs by level. One fires when its level is reached, and then at most once in `cooldown_s`, unless the level has
    risen above the one it was last told.
    """

    def __init__(self, shares: Sequence[float] = SHARES, cooldown_s: float = COOLDOWN_S) -> None:
        """Raises ConfigError for shares that do not ascend within 0 to 1, or a negative cool-down."""
        if len(shares) != len(SHARES) or list(shares) != sorted(shares) or not 0 < shares[0] <= shares[-1] <= 1:
            raise ConfigError(
                f"[memory] pressure begins at {tuple(shares)}; {len(SHARES)} ascending shares of the limit, above 0 and "
                "at most 1, are needed"
            )
        if cooldown_s < 0:
            raise ConfigError(f"[memory] the cool-down is {cooldown_s} s; 0 or more is allowed")
        self.shares, self.cooldown_s = tuple(shares), cooldown_s
        self._told: list[tuple[int, Callback]] = []
        self._last: dict[int, tuple[int, float]] = {}  # call-back's number -> level and time of its last call

    def add(self, callback: Callback, at: str = "low") -> None:
        """Have `callback` called at this level and above. Raises ConfigError for a level that does not exist."""
        if at not in LEVELS[1:]:
            raise ConfigError(f"[memory] pressure level {at!r}; {', '.join(LEVELS[1:])} are allowed")
        self._told.append((LEVELS.index(at), callback))

    def due(self, level: int, now: float) -> list[Callback]:
        """The call-backs to call now, marked as called. A level of 0 ends every cool-down."""
        if level == 0:
            self._last.clear()
        found = []
        for number, (at, callback) in enumerate(self._told):
            if level < at or level == 0:
                continue
            last = self._last.get(number)
            if last is None or level > last[0] or now - last[1] >= self.cooldown_s:
                self._last[number] = (level, now)
                found.append(callback)
        return found
