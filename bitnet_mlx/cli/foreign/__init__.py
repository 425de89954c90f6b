"""What people type from memory: flags and commands of mlx-lm and llama.cpp that mean something else here, or nothing.

Each is refused with the way to the same thing here, before anything is loaded. `NOT_AS_IN_MLX_LM` is what --help says of
flags that have mlx-lm's name and another default or meaning.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bitnet_mlx.cli.foreign.commands import COMMANDS, NOT_AS_IN_MLX_LM
from bitnet_mlx.cli.foreign.flags import BY_COMMAND, EVERYWHERE

__all__ = ["COMMANDS", "NOT_AS_IN_MLX_LM", "nearest", "refused"]


def refused(command: str, given: Sequence[str], known: Iterable[str]) -> list[str]:
    """What to say of each flag of other programs among the words given; known: the command's own flags."""
    ours, table = set(known), {**EVERYWHERE, **BY_COMMAND.get(command, {})}
    flags = dict.fromkeys(word.partition("=")[0] for word in given)
    return [f"{flag}: {table[flag]}" for flag in flags if flag not in ours and flag in table]


def nearest(name: str, known: Iterable[str]) -> str | None:
    """What was probably meant."""
    import difflib

    return next(iter(difflib.get_close_matches(name, list(known), 1)), None)
