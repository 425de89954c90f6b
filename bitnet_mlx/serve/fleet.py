"""The models of a server: the one that it was started with, and others that are loaded when a request names them, but only
those that were listed at the start, one at a time."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields

from bitnet_mlx.errors import BitnetError
from bitnet_mlx.serve.engine import Counts, Engine
from bitnet_mlx.serve.failures import ApiError
from bitnet_mlx.serve.jobs import Model

log = logging.getLogger(__name__)
_BUSY_SECONDS = 5  # after which to ask again where another model is in use


@dataclass
class Served:
    """A loaded model. users: requests that hold it."""

    model: Model
    engine: Engine
    users: int = field(default=0, compare=False)


class Fleet:
    """listed: the names that may be loaded. load: makes one of them; BitnetError where it cannot. Used by any thread."""

    def __init__(self, main: Served, listed: Iterable[str] = (), load: Callable[[str], Served] | None = None) -> None:
        self.main, self.listed, self._load = main, tuple(listed), load
        self._other: Served | None = None
        self._loading = threading.Lock()
        self._users = threading.Lock()
        self._before = Counts()  # of models that were let go of
        self._stopped = False

    @property
    def loaded(self) -> list[Served]:
        """What can answer at once, the main one first."""
        other = self._other
        return [self.main] if other is None else [self.main, other]

    @property
    def counts(self) -> Counts:
        """Of all engines since the start."""
        total = self._before
        for served in self.loaded:
            total = added(total, served.engine.counts)
        return total

    def start(self) -> None:
        """The main one's engine begins."""
        self.main.engine.start()

    def stop(self) -> None:
        """End after the steps in progress."""
        with self._loading:
            self._stopped = True
            for served in self.loaded:
                served.engine.stop()

    def find(self, name: str) -> Served | None:
        """A loaded model; None for one that is listed and not loaded. Raises ApiError 404 for any other name."""
        for served in self.loaded:
            if served.model.name == name:
                return served
        if name in self.listed:
            return None
        names = ", ".join(repr(n) for n in dict.fromkeys((self.main.model.name, *self.listed)))
        raise ApiError(
            404, f"The model {name[:200]!r} is not served here; {names} can be asked for", param="model",
            code="model_not_found",
        )  # fmt: skip

    def take(self, name: str) -> Served:
        """The model of that name, loaded first if need be, held until `release`. It may take its time: not for the event loop.

        Raises ApiError: 404 for a name that is not listed, 503 where it cannot be loaded now.
        """
        found = self._held(name)
        if found is not None:
            return found
        with self._loading:
            found = self._held(name)  # another request has waited for the same
            if found is not None:
                return found
            if self._stopped:
                raise ApiError(503, "The server is shutting down", code="shutting_down")
            self._let_go()
            self._other = self._made(name)
            self._other.engine.start()
            self._other.users = 1
            return self._other

    def release(self, served: Served) -> None:
        """A request is through with its model."""
        with self._users:
            served.users -= 1

    def _held(self, name: str) -> Served | None:
        with self._users:
            found = self.find(name)
            if found is not None:
                found.users += 1
            return found

    def _let_go(self) -> None:
        """Of the other model that is loaded. Raises ApiError 503 while somebody uses it."""
        with self._users:
            other = self._other
            if other is None:
                return
            if other.users:
                raise ApiError(
                    503, f"{other.model.name!r} is in use, and one model beside {self.main.model.name!r} is loaded at a time; "
                    f"try again in {_BUSY_SECONDS} s", code="model_busy", headers={"Retry-After": str(_BUSY_SECONDS)},
                )  # fmt: skip
            self._other = None
        other.engine.stop()
        self._before = added(self._before, other.engine.counts)

    def _made(self, name: str) -> Served:
        assert self._load is not None
        began = time.monotonic()
        try:
            made = self._load(name)
        except BitnetError as error:
            log.warning("[serve] %s was asked for and could not be loaded: %s", name, error)
            raise ApiError(
                503, f"{name} could not be loaded: {error}", param="model", code="model_load_failed"
            ) from error
        log.info("[serve] %s loaded in %.1f s", name, time.monotonic() - began)
        return made


def added(a: Counts, b: Counts) -> Counts:
    """Field by field; what an engine holds is 0 once it has ended."""
    return Counts(**{f.name: getattr(a, f.name) + getattr(b, f.name) for f in fields(Counts)})
