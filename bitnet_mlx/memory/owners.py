"""Who owns what: things that were registered, by weak reference, and the bytes they hold now."""

from __future__ import annotations

import gc
import inspect
import sys
import types
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bitnet_mlx.errors import ConfigError
from bitnet_mlx.memory.records import OWNERS, Leak

Parts = Callable[[Any], Mapping[str, int]]
_OURS = "bitnet_mlx.memory"
_DEEP = 3  # references followed from a thing to what has a name


@dataclass
class Holding:
    """One registered thing. scope: the scope it belongs to, None for what may live on. ended: when that scope ended."""

    ref: weakref.ref[Any]
    parts: Parts | dict[str, int]
    label: str
    on_mlx: bool
    scope: int | None
    scope_name: str
    ended: float | None = None

    def bytes(self) -> dict[str, int]:
        """Bytes by owner; none once the thing is gone."""
        thing = self.ref()
        if thing is None:
            return {}
        return dict(self.parts(thing)) if callable(self.parts) else self.parts


def parts_of(thing: Any, owner: str | Parts, nbytes: int | None) -> Parts | dict[str, int]:
    """How a thing's bytes are found: a number, its own `nbytes` each time, or a function that splits them by owner."""
    if callable(owner):
        return owner
    if owner not in OWNERS[:-1]:
        raise ConfigError(f"[memory] owner {owner!r}; {', '.join(OWNERS[:-1])} are allowed")
    if nbytes is not None:
        return {owner: nbytes}
    if not hasattr(thing, "nbytes"):
        raise ConfigError(f"[memory] {type(thing).__name__} has no nbytes; give the number of bytes")
    return lambda held: {owner: int(held.nbytes)}


class Holdings:
    """All of one tracker's. Not locked: the tracker is."""

    def __init__(self) -> None:
        self._held: list[Holding] = []

    def add(self, holding: Holding) -> None:
        """Register; things that are gone are dropped on the way."""
        self._held = [h for h in self._held if h.ref() is not None]
        self._held.append(holding)

    def totals(self) -> tuple[dict[str, int], int]:
        """(bytes by owner, bytes of those that lie in MLX arrays). A thing registered twice counts once."""
        found = dict.fromkeys(OWNERS[:-1], 0)
        on_mlx, seen = 0, set()
        for holding in self._held:
            key = (id(holding.ref()), holding.label)
            if key in seen:
                continue
            seen.add(key)
            for owner, nbytes in holding.bytes().items():
                found[owner] += nbytes
                on_mlx += nbytes if holding.on_mlx else 0
        return found, on_mlx

    def things(self, owner: str) -> list[Any]:
        """Those alive that hold bytes for this owner."""
        found = [h.ref() for h in self._held if h.bytes().get(owner)]
        return [thing for thing in found if thing is not None]

    def end(self, scope: int, now: float) -> None:
        """A scope has ended: what belongs to it should be gone soon."""
        for holding in self._held:
            if holding.scope == scope and holding.ended is None:
                holding.ended = now

    def keep(self, thing: Any) -> None:
        """The thing may outlive its scope."""
        for holding in self._held:
            if holding.ref() is thing:
                holding.scope = None

    def leaks(self, now: float) -> list[Leak]:
        """What is alive though its scope has ended, the largest first."""
        found = []
        for holding in self._held:
            thing = holding.ref()
            if thing is None or holding.scope is None or holding.ended is None:
                continue
            for owner, nbytes in holding.bytes().items():
                age = now - holding.ended
                found.append(Leak(holding.scope_name, owner, holding.label, nbytes, age, holders(thing)))
        return sorted(found, key=lambda leak: -leak.nbytes)


def holders(thing: Any) -> tuple[str, ...]:
    """What refers to a thing, in words: names first, then running functions by their frames, then containers."""
    found = _holders(thing, _DEEP, set()) + _running(thing)
    return tuple(sorted(dict.fromkeys(found), key=lambda text: text.startswith("a ")))


def _running(thing: Any) -> list[str]:
    """Functions that run now and have the thing in a local variable."""
    found = []
    for top in sys._current_frames().values():
        frame: types.FrameType | None = top
        while frame is not None:
            ours = str(frame.f_globals.get("__name__", "")).startswith(_OURS)
            if not ours and frame.f_code.co_flags & inspect.CO_OPTIMIZED:
                seen = frame.f_locals
                for name in _keys(seen, thing):
                    found.append(f"{name!r} of {frame.f_code.co_name}(), which runs")
                if sys.version_info < (3, 13):
                    seen.clear()  # a copy that the frame keeps, and with it what it holds
            frame = frame.f_back
    return found


def _holders(thing: Any, deep: int, ignored: set[int]) -> list[str]:
    found: list[str] = []
    referrers = gc.get_referrers(thing)
    ignored |= {id(referrers), id(found)}
    for holder in referrers:
        if id(holder) not in ignored and not isinstance(holder, (types.FrameType, weakref.ref, Holding)):
            ignored.add(id(holder))
            found += _named(holder, thing, deep, ignored)
    return found


def _keys(table: Mapping[Any, Any], thing: Any) -> list[Any]:
    keys = []
    for key, value in table.items():  # a comprehension would put `thing` into a cell, which is one more referrer
        if value is thing:
            keys.append(key)
    return keys


def _named(holder: Any, thing: Any, deep: int, ignored: set[int]) -> list[str]:
    kind = type(holder).__name__  # `holder` itself in a comprehension would lie in a cell, one more referrer
    if isinstance(holder, dict):
        keys = _keys(holder, thing)
        if "__name__" in holder and "__spec__" in holder:  # a module's names
            module = holder["__name__"]
            return [f"{key!r} of module {module}" for key in keys]
        above = _holders(holder, deep - 1, ignored) if deep else []
        owner = above[0] if above else "a dict"
        return [f"{owner[2:]}.{key}" if owner[:2] == "a " and above else f"{owner}, under {key!r}" for key in keys]
    if isinstance(holder, (list, tuple, set, frozenset, types.CellType)):
        above = (_holders(holder, deep - 1, ignored) or _running(holder)) if deep else []
        return [f"{above[0]}, in a {kind}" if above else f"a {kind}"]
    if isinstance(holder, types.GeneratorType):
        return [f"a local variable of {holder.__name__}(), which waits"]
    names = _keys(getattr(holder, "__dict__", {}), thing)
    return [f"{kind}.{name}" for name in names] or [f"a {kind}"]
