"""Typed reading of a table from config.json: missing keys are collected, wrong values are refused by the key's name."""

from __future__ import annotations

import math
from typing import Any

from bitnet_mlx.errors import FormatError
from bitnet_mlx.formats.strict_json import shown

REQUIRED = object()


class Fields:
    """Reads one table. `where` names it in messages. null counts as absent, as it does in transformers."""

    def __init__(self, table: dict[str, Any], where: str) -> None:
        self.table = table
        self.where = where
        self.missing: list[str] = []

    def get(self, key: str) -> Any:
        return self.table.get(key)

    def wrong(self, key: str, allowed: str) -> FormatError:
        return FormatError(f"[config] {self.where}: {key} is {shown(self.table.get(key))}; {allowed}")

    def _default(self, key: str, default: Any, zero: Any) -> Any:
        if default is not REQUIRED:
            return default
        self.missing.append(key)
        return zero

    def size(self, key: str, default: Any = REQUIRED, limit: int = 1 << 31) -> int:
        """A whole number from 1 to `limit`."""
        value = self.get(key)
        if value is None:
            return self._default(key, default, 1)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
            raise self.wrong(key, f"a whole number from 1 to {limit} is needed")
        return value

    def number(self, key: str, default: Any = REQUIRED, positive: bool = True) -> float:
        """A finite number, above zero unless `positive` is False."""
        value = self.get(key)
        if value is None:
            return self._default(key, default, 1.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e300 or math.isnan(value):
            raise self.wrong(key, "a finite number is needed")
        if positive and value <= 0:
            raise self.wrong(key, "a number above 0 is needed")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false is needed")
        return value

    def text(self, key: str, default: Any = REQUIRED) -> str:
        value = self.get(key)
        if value is None:
            return self._default(key, default, "")
        if not isinstance(value, str):
            raise self.wrong(key, "a text is needed")
        return value

    def token(self, key: str) -> int | None:
        """A token id, or None where the key is absent, null or negative (some configs write -1 for none)."""
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(key, "a token id (a whole number) or null is needed")
        return value if value >= 0 else None

    def tokens(self, key: str) -> tuple[int, ...]:
        """Token ids from a number, a list of numbers or null."""
        value = self.get(key)
        items = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) for item in items):
            raise self.wrong(key, "a token id, a list of token ids or null is needed")
        return tuple(dict.fromkeys(item for item in items if item >= 0))

    def nested(self, key: str) -> dict[str, Any] | None:
        """A table, or None where the key is absent, null or an empty table."""
        value = self.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(key, "a table or null is needed")
        return value or None

    def complete(self) -> None:
        """Raise FormatError that lists every required key that was missing."""
        if self.missing:
            raise FormatError(
                f"[config] {self.where} lacks {', '.join(self.missing)}; "
                f"it has {', '.join(sorted(map(str, self.table))[:12]) or 'nothing'}"
            )
