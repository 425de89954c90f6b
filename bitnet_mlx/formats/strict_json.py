"""JSON from files that may be damaged: strict parsing, and values as a message may show them."""

from __future__ import annotations

import json
from typing import Any

from bitnet_mlx.errors import FormatError


def parse_json(text: str, what: str) -> Any:
    """Strict JSON: no duplicate keys, no NaN or Infinity. `what` opens the FormatError's text."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for key, value in items:
            if key in table:
                raise FormatError(f"{what} has the key {shown(key)} twice")
            table[key] = value
        return table

    def constant(word: str) -> None:
        raise FormatError(f"{what} holds {word}, which is no JSON number")

    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except RecursionError as error:
        raise FormatError(f"{what} is nested too deeply") from error
    except ValueError as error:  # not JSON, or an integer of thousands of digits
        raise FormatError(f"{what} is not valid JSON ({error})") from error


def shown(value: Any) -> str:
    """A value from a file as it may be printed: escaped, on one line, cut to 120 characters."""
    text = ascii(value)
    return text if len(text) <= 120 else f"{text[:120]}..."
