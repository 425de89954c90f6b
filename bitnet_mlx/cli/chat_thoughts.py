"""An answer as it appears: what the model thinks before it is told apart by being dim."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

from bitnet_mlx.cli import options

_DIM, _PLAIN = "\x1b[2m", "\x1b[22m"


def shown(session: Any, stream: Iterator[Any]) -> Iterator[Any]:
    """The same stream, printed as it comes. On a terminal thoughts are dim, without their marks; elsewhere nothing is changed."""
    if not sys.stdout.isatty() or os.environ.get("TERM") == "dumb" or "NO_COLOR" in os.environ:
        yield from options.shown(stream)
        return
    thinking = False
    for response in stream:
        thought, said = session.part
        if thought:
            thinking = True
            options.show(f"{_DIM}{thought}{_PLAIN}")
        if thinking and said:
            thinking = False
            options.show("\n\n")
        options.show(said)
        yield response
