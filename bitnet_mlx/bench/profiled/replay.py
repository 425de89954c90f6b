"""The same tokens through the same model twice, with and without instruments, pass by pass in turns.

The answer that a user gets is made first, without instruments. Its tokens then go through two caches, one for each way;
which way goes first changes with every token, so the machine's moods fall on both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bitnet_mlx.bench.copying import machine_copy
from bitnet_mlx.bench.profiled.engine import Timed, timed
from bitnet_mlx.bench.stamp import stamp
from bitnet_mlx.errors import ConfigError
from bitnet_mlx.generation.sampling import Sampler, SamplingConfig
from bitnet_mlx.generation.stream import PREFILL_STEP, stream_generate
from bitnet_mlx.models.decoder import Decoder
from bitnet_mlx.profile.summary import Pass, Profile
from bitnet_mlx.tokenizer import Tokenizer


def profile_generation(
    model: Decoder, tokenizer: Tokenizer, prompt: str | Sequence[int], max_tokens: int = 32, **options: Any
) -> Profile:
    """Generate, then profile what was generated. Options are stream_generate's.

    Raises what stream_generate raises, and BackendError where the engine has no clock for it.
    """
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else [int(i) for i in prompt]
    responses = list(stream_generate(model, tokenizer, ids, max_tokens, **options))
    return replay(
        model, ids, [r.token for r in responses], text="".join(r.text for r in responses),
        first_token_s=responses[0].ttft_s, sampling=options.get("sampling"),
    )  # fmt: skip


def replay(
    decoder: Decoder,
    ids: Sequence[int],
    tokens: Sequence[int],
    *,
    text: str = "",
    first_token_s: float = 0.0,
    load_s: float | None = None,
    model: str = "",
    sampling: SamplingConfig | Sampler | None = None,
    copy: float | None = None,
) -> Profile:
    """The profile of a generation that is known: prompt `ids`, then `tokens`, the last of which is not fed.

    copy: bytes a second of the machine's copy, measured here if it is not given. Raises ConfigError without ids.
    """
    if not len(ids):
        raise ConfigError("[profile] the prompt is empty; it needs at least one token")
    engine = timed(decoder)
    config = sampling.config if isinstance(sampling, Sampler) else sampling or SamplingConfig()
    pair = _Pair(decoder, engine, Sampler(config))
    prefill = pair.passes(list(ids), 0)
    decode = tuple(pair.passes([token], i) for i, token in enumerate(tokens[:-1], 1))
    return Profile(
        decoder.name, model, load_s, first_token_s, text, prefill, decode, pair.same,
        machine_copy(decoder.name) if copy is None else copy, engine.launch_kind, stamp(decoder.name),
    )  # fmt: skip


class _Pair:
    """One model, plain and with instruments, and a cache for each."""

    def __init__(self, decoder: Decoder, engine: Timed, sampler: Sampler) -> None:
        self._decoder, self._engine, self._sampler = decoder, engine, sampler
        self._plain, self._cut = decoder.make_cache(), decoder.make_cache()
        self._history: list[int] = []
        self.same = True

    def passes(self, ids: list[int], number: int) -> Pass:
        """One pass of `ids` each way, odd ones with instruments first."""
        self._history += ids
        positions = self._plain.offset
        if number % 2:
            cut = self._with(ids)
            plain, plain_s = self._without(ids)
        else:
            plain, plain_s = self._without(ids)
            cut = self._with(ids)
        spans = tuple(self._engine.recorder.spans)
        self.same = self.same and bool(np.array_equal(plain, cut))
        traffic = self._engine.traffic(len(ids), positions)
        return Pass(len(ids), positions, plain_s, spans, traffic, self._engine.launches())

    def _without(self, ids: list[int]) -> tuple[np.ndarray, float]:
        start = time.perf_counter()
        logits = self._fed(lambda piece: self._decoder.step([piece], [self._plain])[0], ids)
        self._sampler.pick(self._sampler.scores(logits, self._history))
        return logits, time.perf_counter() - start

    def _with(self, ids: list[int]) -> np.ndarray:
        recorder = self._engine.recorder
        recorder.begin()
        logits = self._fed(lambda piece: self._engine.step(piece, self._cut), ids)
        self._sampler.pick(self._sampler.scores(logits, self._history))
        recorder.mark("sampling")
        return logits

    @staticmethod
    def _fed(step: Callable[[list[int]], np.ndarray], ids: list[int]) -> np.ndarray:
        """In the pieces that the generation loop feeds; the logits after the last."""
        logits = np.empty(0, np.float32)
        for at in range(0, len(ids), PREFILL_STEP):
            logits = step(ids[at : at + PREFILL_STEP])
        return logits.copy()
