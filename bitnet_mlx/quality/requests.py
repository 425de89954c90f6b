"""What evaluation harnesses ask of a model: log likelihoods of continuations and of whole texts, and generated text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bitnet_mlx.errors import ConfigError
from bitnet_mlx.generation import SamplingConfig
from bitnet_mlx.generation.api import generate
from bitnet_mlx.models.decoder import Decoder
from bitnet_mlx.quality.bits import total_nats
from bitnet_mlx.quality.score import log_softmax
from bitnet_mlx.tokenizer import Tokenizer

MAX_TOKENS = 256  # of a generated answer that does not say how long it may be
_KNOWN = frozenset(("until", "max_gen_toks", "max_tokens", "do_sample", "temperature", "top_p", "top_k", "min_p"))


class Answers:
    """Requests to one decoder. The positions that a request has in common with the one before are computed once."""

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, seed: int = 0) -> None:
        self.decoder, self.tokenizer, self.seed = decoder, tokenizer, seed
        self.context = decoder.config.max_position_embeddings
        self._cache: Any = None
        self._held: list[int] = []

    @property
    def prefix(self) -> int:
        """What stands before a text without a context: the beginning-of-text token, else the end's. Raises ConfigError."""
        tokenizer = self.tokenizer
        token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if token is None:
            raise ConfigError(
                "[evaluate] the model has neither a BOS nor an EOS token to put before a text without context"
            )
        return token

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of both. Spaces at the end of the context belong to the continuation, and both are encoded as one text."""
        if not context.strip():
            ids = self.tokenizer.encode(context + continuation, add_special_tokens=False)
            return (ids[:1], ids[1:]) if ids[:1] == [self.prefix] else ([self.prefix], ids)
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        before = self.tokenizer.encode(context)
        return before, self.tokenizer.encode(context + continuation)[len(before) :]

    def log_likelihood(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        """ln p of the continuation after the context, and whether greedy decoding gives it. What is longer than the
        model's context loses its beginning."""
        if not continuation:
            return 0.0, True
        ids = [*context, *continuation][-(self.context + 1) :]
        first = max(1, len(ids) - len(continuation))
        rows = log_softmax(self._logits(ids[:-1], first - 1))
        targets = np.asarray(ids[first:], np.int64)
        picked = rows[np.arange(len(targets)), targets]
        return float(picked.sum()), bool((rows.argmax(axis=-1) == targets).all())

    def text_log_likelihood(self, text: str) -> float:
        """ln p of a whole text after `prefix`, in windows of the model's context that do not overlap, but for the last,
        which is a whole one too."""
        ids = np.asarray([self.prefix, *self.tokenizer.encode(text, add_special_tokens=False)], np.int64)
        return -total_nats(self.decoder, ids, self.context, self.context) if len(ids) > 1 else 0.0

    def generate(self, context: str, options: Mapping[str, Any]) -> str:
        """The text that follows, without the string that ended it. options: until, max_gen_toks (or max_tokens), do_sample,
        temperature, top_p, top_k, min_p. Raises ConfigError for others."""
        unknown = sorted(set(options) - _KNOWN)
        if unknown:
            raise ConfigError(
                f"[evaluate] a task generates with {', '.join(unknown)}; {', '.join(sorted(_KNOWN))} are known"
            )
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else [str(stop) for stop in until]
        room = int(options.get("max_gen_toks", options.get("max_tokens", MAX_TOKENS)))
        ids = self.tokenizer.encode(context) or [self.prefix]
        ids = ids[-max(1, self.context - room) :]
        temp = float(options.get("temperature") or 0.0)
        if not options.get("do_sample", temp > 0):
            temp = 0.0
        picked = {name: options[name] for name in ("top_p", "top_k", "min_p") if options.get(name) is not None}
        sampling = SamplingConfig().replaced(temp=temp, seed=self.seed, **picked)
        return generate(self.decoder, self.tokenizer, ids, room, sampling=sampling, stop=[s for s in stops if s])

    def _logits(self, ids: list[int], first: int) -> np.ndarray:
        """float32 [len(ids) - first, vocab]: after ids[first], and on."""
        shared = 0
        while shared < min(first, len(self._held)) and ids[shared] == self._held[shared]:
            shared += 1
        if self._cache is None or shared == 0:
            self._cache, shared = self.decoder.make_cache(), 0
        elif shared < len(self._held):
            self._cache.trim(shared)
        self._held = []  # nothing is known of the cache while a step may fail
        if first > shared:
            self.decoder.step([ids[shared:first]], [self._cache], "last")
        [logits] = self.decoder.step([ids[first:]], [self._cache], "all")
        self._held = list(ids)
        return logits
