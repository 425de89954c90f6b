"""Speculative decoding as an option of a stream: by prompt look-up, or by a draft model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bitnet_mlx.errors import ConfigError
from bitnet_mlx.generation.draft_length import DraftLength
from bitnet_mlx.generation.drafting import Drafter, DraftModel, PromptLookup
from bitnet_mlx.generation.row_times import RowTimes, row_times
from bitnet_mlx.generation.sampling import Sampler
from bitnet_mlx.generation.steps import SpeculativeSteps
from bitnet_mlx.models.decoder import Decoder
from bitnet_mlx.tokenizer import Tokenizer

MOST_GUESSES = 64


class Speculation:
    """Guesses for one decoder's texts, one text at a time; a draft model keeps its cache from one to the next.

    num_draft_tokens: guesses a step. None: as many as pay by what is measured of this machine and of the text, and none
    where none pay. The text is the same with guesses and without (generation/steps.py).
    """

    def __init__(self, decoder: Decoder, drafter: Drafter, num_draft_tokens: int | None = None) -> None:
        """Raises ConfigError for a number outside 1 to 64."""
        if num_draft_tokens is not None and not 1 <= num_draft_tokens <= MOST_GUESSES:
            raise ConfigError(
                f"[speculate] num_draft_tokens is {num_draft_tokens}; 1 to {MOST_GUESSES} are allowed; leave it out to let "
                "measurements choose"
            )
        self.decoder, self._drafter, self._fixed = decoder, drafter, num_draft_tokens
        self._times: RowTimes | None = None
        self.tell = True  # whether the end of guessing is logged

    @classmethod
    def by_lookup(cls, decoder: Decoder, num_draft_tokens: int | None = None) -> Speculation:
        """Guess what followed where the same tokens stood before: for texts that repeat themselves."""
        return cls(decoder, PromptLookup(), num_draft_tokens)

    @classmethod
    def by_model(
        cls, decoder: Decoder, tokenizer: Tokenizer, draft: Decoder, draft_tokenizer: Tokenizer,
        num_draft_tokens: int | None = None,
    ) -> Speculation:  # fmt: skip
        """Guess by a smaller model. Raises ConfigError where its vocabulary is another."""
        return cls(decoder, DraftModel(draft, draft_tokenizer, decoder, tokenizer), num_draft_tokens)

    def prepare(self) -> None:
        """Measure what rows cost, unless that is known already or a number is fixed: at most some seconds."""
        if self._fixed is None and self._times is None:
            self._times = row_times(self.decoder)

    def steps(self, cache: Any, sampler: Sampler, prompt: Sequence[int], limit: int) -> SpeculativeSteps:
        """The steps of one text. cache: it holds the prompt. limit: tokens of prompt and text at most."""
        self.prepare()
        length = DraftLength(self._times, self._fixed, self._drafter.free)
        return SpeculativeSteps(self.decoder, cache, self._drafter, length, sampler, prompt, limit, self.tell)
