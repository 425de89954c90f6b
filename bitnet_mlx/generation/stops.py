"""Stop strings: text is held back only while it could still be the start of one."""

from __future__ import annotations

from collections.abc import Sequence

from bitnet_mlx.errors import ConfigError


class StopStrings:
    """Feed text as it comes; what comes back is safe to show. The stop string itself is never shown."""

    def __init__(self, stops: Sequence[str] = ()) -> None:
        """Raises ConfigError for an empty stop string, which every text would contain."""
        if isinstance(stops, str):
            stops = (stops,)
        for stop in stops:
            if not isinstance(stop, str) or not stop:
                raise ConfigError(
                    f"[generate] stop is {stop!r}; at least one character is needed; leave --stop out for none"
                )
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """(text to show, whether a stop string was met). After a stop, what follows it is dropped."""
        if not self._stops:
            return text, False
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = max(overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """The text still held back, when no more will come."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """The longest proper start of `stop` that `text` ends with, in characters."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
