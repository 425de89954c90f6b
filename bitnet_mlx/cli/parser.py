"""The parser of one command: its errors are ConfigErrors that say what to do, as all others are."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from bitnet_mlx.cli import foreign
from bitnet_mlx.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Of `bitnet-mlx COMMAND`."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"bitnet-mlx {command}", description=description)
        self._command = command

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError."""
        if message.endswith("expected one argument"):
            message += " (one that begins with - is given as OPTION=TEXT)"
        raise ConfigError(f"[{self._command}] {message}; bitnet-mlx {self._command} --help tells the options")

    def parse_args(self, args: Sequence[str], namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        """The options. Raises ConfigError, which names every flag that is not known and what to say instead."""
        words = list(args[: args.index("--")] if "--" in args else args)
        theirs = foreign.refused(self._command, words, self._option_string_actions)
        helping = bool({"-h", "--help"} & set(words))
        if theirs and not helping:
            self.error("; ".join(theirs))
        needed = [] if helping else [action for action in self._actions if action.required]
        for action in needed:  # asked for below, after words that belong to nothing, which are often what is missing
            action.required = False
        try:
            found, rest = self.parse_known_args(args, namespace)
        finally:
            for action in needed:
                action.required = True
        missing = [_name(action) for action in needed if getattr(found, action.dest) is None]
        told = [self._unknown(rest)] if rest else []
        told += [f"the following arguments are required: {', '.join(missing)}"] if missing else []
        if told:
            self.error("; ".join(told))
        return found

    def _unknown(self, rest: Sequence[str]) -> str:
        flags = [word.partition("=")[0] for word in rest if word.startswith("-")]
        if not flags:
            return (
                f"{' '.join(rest)} belongs to no option (switches take no value; a text of several words needs quotes)"
            )
        meant = {flag: foreign.nearest(flag, self._option_string_actions) for flag in flags}
        return "; ".join(
            f"no option {flag}" + (f", did you mean {near}?" if near else "") for flag, near in meant.items()
        )


def _name(action: argparse.Action) -> str:
    """An option or a value as a message names it."""
    return "/".join(action.option_strings) or str(action.metavar or action.dest)
