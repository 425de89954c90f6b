"""What may come next, guessed cheaply: from the text so far, or by a smaller model. The guesses never change a text."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import numpy as np

from bitnet_mlx.errors import ConfigError
from bitnet_mlx.generation.sampling import Sampler
from bitnet_mlx.models.decoder import Decoder
from bitnet_mlx.tokenizer import Tokenizer

_SIZES = (4, 3, 2)  # tokens that must recur, longest first
_CHUNK = 512  # tokens that a draft model is fed at once


class Drafter(Protocol):
    """Guesses tokens. `name` is told to the user. `free`: a guess takes no time worth counting."""

    name: str
    free: bool

    def begin(self, ids: Sequence[int]) -> None:
        """A text starts, with these ids."""
        ...

    def kind(self, history: Sequence[int]) -> Hashable | None:
        """What sort of guess could follow; guesses of one sort are right equally often. None: there is nothing to guess."""
        ...

    def draft(self, history: Sequence[int], count: int, prompt_tokens: int, sampler: Sampler) -> list[int]:
        """At most `count` ids that may follow. The sampler is the text's own: its draws are looked at, not taken."""
        ...


class PromptLookup:
    """The last few tokens stood in the text before: what followed them there is the guess (prompt look-up decoding)."""

    name = "prompt look-up"
    free = True

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # the last tokens -> where the text went on
        self._entered = 0  # positions whose tokens ended an entry
        self._found = 0

    def begin(self, ids: Sequence[int]) -> None:
        self._after, self._entered = {}, 0

    def kind(self, history: Sequence[int]) -> int | None:
        """How many tokens recur."""
        last = len(history) - 1  # its entry would find itself
        for at in range(self._entered, last):
            for size in _SIZES:
                if size <= at + 1:
                    self._after[tuple(history[at + 1 - size : at + 1])] = at + 1
        self._entered = max(self._entered, last)
        for size in _SIZES:
            found = self._after.get(tuple(history[-size:]))
            if found is not None:
                self._found = found
                return size
        return None

    def draft(self, history: Sequence[int], count: int, prompt_tokens: int, sampler: Sampler) -> list[int]:
        """What followed; past the text's end the guess goes on with itself, as a repeated pattern does."""
        guesses: list[int] = []
        for at in range(self._found, self._found + count):
            guesses.append(history[at] if at < len(history) else guesses[at - len(history)])
        return guesses


class DraftModel:
    """A smaller model of the same vocabulary. It looks at the draws that the text's sampler makes next, so that where both
    models agree on the probabilities it guesses what will be drawn, at any temperature.
    """

    name = "draft model"
    free = False

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, target: Decoder, target_tokenizer: Tokenizer) -> None:
        """Raises ConfigError unless every id has the same meaning for both."""
        check_vocabulary(tokenizer, target_tokenizer)
        self._decoder, self._vocabulary = decoder, target.config.vocab_size
        self._limit = decoder.config.max_position_embeddings
        self._cache: Any = None
        self._held: list[int] = []  # ids that the cache holds

    def begin(self, ids: Sequence[int]) -> None:
        if self._cache is None:
            self._cache = self._decoder.make_cache()
        self._keep(ids, 0)
        if len(ids) < self._limit:
            self._feed(ids[len(self._held) :])

    def kind(self, history: Sequence[int]) -> str | None:
        return self.name if len(history) < self._limit else None

    def draft(self, history: Sequence[int], count: int, prompt_tokens: int, sampler: Sampler) -> list[int]:
        self._keep(history, max(0, len(self._held) - 64))
        logits = self._feed(history[len(self._held) :])
        whole = list(history)
        for ahead in range(min(count, self._limit - len(history) + 1)):
            if ahead:
                logits = self._feed(whole[-1:])
            whole.append(sampler.pick(sampler.scores(self._fitted(logits), whole, prompt_tokens), ahead))
        return whole[len(history) :]

    def _keep(self, ids: Sequence[int], agreed: int) -> None:
        """Forget what is not the start of `ids`, of which the first `agreed` are known to be the same; never all of it."""
        most = min(len(self._held), len(ids) - 1)
        kept = next((i for i in range(min(agreed, most), most) if self._held[i] != ids[i]), most)
        del self._held[kept:]
        self._cache.trim(kept)

    def _feed(self, ids: Sequence[int]) -> np.ndarray:
        logits = np.empty(0, np.float32)
        for at in range(0, len(ids), _CHUNK):
            part = list(ids[at : at + _CHUNK])
            logits = self._decoder.step([part], [self._cache])[0]
            self._held += part
        return logits

    def _fitted(self, logits: np.ndarray) -> np.ndarray:
        """One number for each id of the target: tables of one vocabulary may be padded to different sizes."""
        short = self._vocabulary - len(logits)
        return logits[: self._vocabulary] if short <= 0 else np.pad(logits, (0, short), constant_values=-np.inf)


def check_vocabulary(draft: Tokenizer, target: Tokenizer) -> None:
    """Raises ConfigError that names the first id with two meanings."""
    if draft.vocab_size != target.vocab_size:
        raise ConfigError(
            f"[draft] the draft model's vocabulary has {draft.vocab_size} tokens and the model's {target.vocab_size}; "
            "both must have the same one: choose a draft of the model's own family"
        )
    for token in range(target.vocab_size):
        mine, theirs = draft.id_to_token(token), target.id_to_token(token)
        if mine != theirs:
            raise ConfigError(
                f"[draft] token {token} is {mine!r} to the draft model and {theirs!r} to the model; both must have the same "
                "vocabulary: choose a draft of the model's own family"
            )
