"""Chrome's trace format (chrome://tracing, Perfetto): one complete event a span; the record rides along in the same file.

Format: "Trace Event Format", Google; times in microseconds; keys that a viewer does not know are kept as metadata.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bitnet_mlx.profile.summary import Pass, Profile


def events(profile: Profile) -> list[dict[str, Any]]:
    """All spans of all instrumented passes, and a longer event around each pass, on one thread's track."""
    passes = [("prefill", profile.prefill), *((f"token {i + 2}", p) for i, p in enumerate(profile.decode))]
    zero = min((span.start for _, p in passes for span in p.spans), default=0)
    found: list[dict[str, Any]] = [
        {"name": "process_name", "ph": "M", "pid": 0, "tid": 0, "args": {"name": f"bitnet-mlx {profile.backend}"}}
    ]
    for name, p in passes:
        if p.spans:
            found.append(_event(name, p.spans[0].start - zero, p.spans[-1].end - zero, _arguments(p)))
        for span in p.spans:
            where = {} if span.layer is None else {"layer": span.layer}
            found.append(_event(span.part, span.start - zero, span.end - zero, where))
    return found


def _event(name: str, start: int, end: int, args: dict[str, Any]) -> dict[str, Any]:
    times = {"ts": start / 1e3, "dur": (end - start) / 1e3}
    return {"name": name, "ph": "X", "pid": 0, "tid": 1, **times, "args": args}


def _arguments(p: Pass) -> dict[str, Any]:
    return {"tokens": p.tokens, "positions": p.positions, "plain_ms": p.plain_s * 1e3, "launches": p.launches}


def write(profile: Profile, path: str | Path) -> None:
    """One file: {"traceEvents": [...], "displayTimeUnit": "ms", "profile": the record}. Raises OSError."""
    whole = {"traceEvents": events(profile), "displayTimeUnit": "ms", "profile": profile.record()}
    Path(path).write_text(json.dumps(whole), encoding="utf-8")
