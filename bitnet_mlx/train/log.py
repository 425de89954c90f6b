"""OUTPUT/log.jsonl: one JSON record a step."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bitnet_mlx.errors import FormatError
from bitnet_mlx.train.disk import writing

NAME = "log.jsonl"


class Log:
    """The log of a run that begins after `done` steps. What an earlier run logged of later steps is taken out: they will
    be taken again, with the same losses. first: the record of the run's first step, {} where it is still to come."""

    def __init__(self, folder: Path, done: int) -> None:
        self.path = folder / NAME
        kept = [entry for entry in read(self.path) if entry["step"] <= done] if done and self.path.exists() else []
        self.first: dict[str, Any] = kept[0] if kept else {}
        scratch = folder / f".{NAME}.writing"
        with writing(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            scratch.write_text("".join(json.dumps(entry) + "\n" for entry in kept), "utf-8")
            os.replace(scratch, self.path)
            self._file = self.path.open("a", encoding="utf-8")

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._file.close()
        except OSError:
            if error[0] is None:
                raise

    def add(self, entries: Iterable[dict[str, Any]]) -> None:
        """Append records. Raises TrainError where that fails, as on a full disk."""
        with writing(self.path):
            self._file.write("".join(json.dumps(entry) + "\n" for entry in entries))
            self._file.flush()


def read(path: Path) -> list[dict[str, Any]]:
    """Records of a log; a last line that a killed process left unfinished is left out. Raises FormatError for others."""
    entries = []
    lines = path.read_text("utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            if line:
                entry = json.loads(line)
                int(entry["step"])
                entries.append(entry)
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise FormatError(
                f"[train] {path}, line {number} is no record of a step: {error!r}; move the file away"
            ) from error
    return entries
