"""The interface that every decoder offers, whatever computes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np

from bitnet_mlx.models.config import DecoderConfig


class Decoder(Protocol):
    """A loaded model. `name` is its backend: numpy, cpu, mlx, metal or cuda."""

    @property
    def name(self) -> str: ...

    @property
    def config(self) -> DecoderConfig: ...

    def make_cache(self, limit: int | None = None) -> Any:
        """An empty cache for one sequence of at most `limit` positions (the model's context by default).

        It has `.offset` (positions filled), `.trim(offset)` and `.nbytes`; `.copy(start, end)` gives an Excerpt of it
        (models/cache.py), and `.extend(excerpts)` fills a cache from those of another.
        """
        ...

    def step(
        self, tokens: Sequence[Sequence[int]], caches: Sequence[Any], logits: Literal["last", "all"] = "last"
    ) -> list[np.ndarray]:
        """Feed each sequence its next tokens, in one pass; lengths may differ.

        Returns float32 logits for each sequence: [vocab] after its last token, or [length, vocab] after every token.
        """
        ...

    def hidden(self, tokens: Sequence[Sequence[int]], caches: Sequence[Any]) -> list[np.ndarray]:
        """As step, but what the head would be given instead of its logits: float32 [length, hidden], normed."""
        ...
