"""Profile: one run's figures, and what they become as JSON and in a notebook."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bitnet_mlx.profile.html import table
from bitnet_mlx.profile.spans import PARTS, Span


@dataclass(frozen=True)
class Pass:
    """One pass through the model: a prompt, or one token.

    plain_s: seconds of the same pass without instruments, taken right before or after. traffic: bytes that each part
    reads and writes (weights and cache). launches: kernels, jobs or calls, as the engine counts.
    """

    tokens: int
    positions: int
    plain_s: float
    spans: tuple[Span, ...]
    traffic: Mapping[str, int]
    launches: int

    @property
    def seconds(self) -> float:
        """The sum of all parts."""
        return sum(span.seconds for span in self.spans)

    def by_part(self) -> dict[str, float]:
        """Seconds of each part."""
        found: dict[str, float] = defaultdict(float)
        for span in self.spans:
            found[span.part] += span.seconds
        return dict(found)


@dataclass(frozen=True)
class Part:
    """One part of a decoded token. bandwidth: bytes a second; share: of the token; of_copy: of the copy bandwidth."""

    seconds: float
    share: float
    bytes: int
    bandwidth: float
    of_copy: float


@dataclass(frozen=True)
class Profile:
    """A profiled generation. prefill: the prompt's pass; decode: one a generated token, without the first.

    same: whether the instrumented passes gave the plain ones' logits to the last bit. copy: bytes a second that a copy
    reads and writes on this machine. machine: what bench/stamp.py says. launch_kind: what `launches` counts.
    """

    backend: str
    model: str
    load_s: float | None
    first_token_s: float
    text: str
    prefill: Pass
    decode: tuple[Pass, ...]
    same: bool
    copy: float
    launch_kind: str
    machine: Mapping[str, Any] = field(default_factory=dict)

    @property
    def token_s(self) -> float:
        """Median seconds of a token without instruments."""
        return statistics.median(step.plain_s for step in self._steps)

    @property
    def coverage(self) -> float:
        """The parts' sum over the uninstrumented time of the same tokens: medians of both."""
        return statistics.median(step.seconds for step in self._steps) / self.token_s

    @property
    def _steps(self) -> Sequence[Pass]:
        """The tokens; of an answer of one token, the prompt's pass is all there is."""
        return self.decode or (self.prefill,)

    def parts(self) -> dict[str, Part]:
        """The parts of a token in the order of a pass: medians over all tokens."""
        taken = [step.by_part() for step in self._steps]
        seconds = {p: statistics.median(t.get(p, 0.0) for t in taken) for p in PARTS if any(p in t for t in taken)}
        whole = sum(seconds.values())
        found = {}
        for name, s in seconds.items():
            moved = round(statistics.fmean(step.traffic.get(name, 0) for step in self._steps))
            rate = moved / s if s else 0.0
            found[name] = Part(s, s / whole if whole else 0.0, moved, rate, rate / self.copy if self.copy else 0.0)
        return found

    def layers(self) -> list[dict[str, float]]:
        """Median seconds of each part of each layer."""
        sums: dict[tuple[int, str], list[float]] = defaultdict(list)
        for step in self._steps:
            here: dict[tuple[int, str], float] = defaultdict(float)
            for span in step.spans:
                if span.layer is not None:
                    here[span.layer, span.part] += span.seconds
            for key, s in here.items():
                sums[key].append(s)
        count = 1 + max((layer for layer, _ in sums), default=-1)
        return [
            {part: statistics.median(sums[layer, part]) for part in PARTS if (layer, part) in sums}
            for layer in range(count)
        ]

    def record(self) -> dict[str, Any]:
        """Everything for JSON; times in seconds, rates in bytes a second."""
        parts = self.parts()
        moved = sum(part.bytes for part in parts.values())
        return {
            "bench": "profile", "backend": self.backend, "model": self.model, "load_s": self.load_s,
            "first_token_s": self.first_token_s,
            "prefill": {
                "tokens": self.prefill.tokens, "plain_s": self.prefill.plain_s, "parts_s": self.prefill.by_part(),
                "launches": self.prefill.launches,
            },
            "decode": {
                "tokens": len(self.decode), "token_s": self.token_s, "parts_sum_s": self.token_s * self.coverage,
                "parts_over_plain": self.coverage, "same_logits": self.same,
                "bytes": moved, "bandwidth": moved / self.token_s,
                "of_copy": moved / self.token_s / self.copy if self.copy else 0.0,
                "launches": round(statistics.median(step.launches for step in self._steps)),
                "launch_kind": self.launch_kind,
                "parts": {name: vars(part) for name, part in parts.items()},
                "layers": self.layers(),
                "plain_s": [step.plain_s for step in self.decode],
            },
            "copy_bandwidth": self.copy, **self.machine,
        }  # fmt: skip

    def _repr_html_(self) -> str:
        rows = [
            [name, f"{p.seconds * 1e3:.3f}", f"{p.share:.1%}", f"{p.bytes / 1e6:.2f}", f"{p.of_copy:.0%}"]
            for name, p in self.parts().items()
        ]
        title = f"{self.backend}: {self.token_s * 1e3:.2f} ms a token; parts sum to {self.coverage:.0%} of that"
        return table(title, ["part", "ms a token", "share", "MB moved", "of copy bandwidth"], rows)
