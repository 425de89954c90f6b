"""The generation loop: any decoder, one sequence, text as it becomes certain."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any

import numpy as np

from bitnet_mlx import memory
from bitnet_mlx.backends import ON_MLX
from bitnet_mlx.errors import ConfigError
from bitnet_mlx.generation.measure import peak_memory_bytes
from bitnet_mlx.generation.sampling import Sampler, SamplingConfig, log_softmax
from bitnet_mlx.generation.speculation import Speculation
from bitnet_mlx.generation.steps import PlainSteps, SpeculationReport, Steps
from bitnet_mlx.generation.stops import StopStrings
from bitnet_mlx.models.decoder import Decoder
from bitnet_mlx.tokenizer import Detokenizer, Tokenizer

MAX_TOKENS = 256
PREFILL_STEP = 512
Progress = Callable[[int, int], None]  # (prompt tokens done, prompt tokens in all)


@dataclass(slots=True, eq=False)
class GenerationResponse:
    """One generated token. Field names are mlx-lm's, where it has them.

    text: what became certain with this token; it may be empty, and never holds a stop string or half a character.
    prompt_tokens: the whole prompt's, of which cached_tokens came from a cache.
    scores: float32 [vocab], the logits after bias and penalty.
    prompt_tps counts the tokens that were computed, not those reused from a cache; generation_tps the time after the
    first token (0 until there are two). ttft_s: from the call to the first token.
    finish_reason: None, then "stop" (an end token or a stop string) or "length".
    peak_memory_bytes is measured with the first and the last token. from_draft: the token had been guessed; speculation:
    with the last token, what guessing gave.
    """

    text: str
    token: int
    scores: np.ndarray = field(repr=False)
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    ttft_s: float
    peak_memory_bytes: int | None
    finish_reason: str | None = None
    cached_tokens: int = 0
    from_draft: bool = False
    speculation: SpeculationReport | None = None

    @property
    def logprobs(self) -> np.ndarray:
        """Log probabilities after bias and penalty, before the filters: float32 [vocab], computed when asked for."""
        return log_softmax(self.scores)


@dataclass(frozen=True)
class _Plan:
    """A request that has been checked."""

    ids: list[int]
    reused: int
    limit: int  # tokens to generate at most
    stop_ids: frozenset[int]
    prefill_step: int


def stream_generate(
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    max_tokens: int = MAX_TOKENS,
    *,
    sampling: SamplingConfig | Sampler | None = None,
    stop: Sequence[str] = (),
    max_kv_size: int | None = None,
    cache: Any = None,
    prefill_step_size: int = PREFILL_STEP,
    progress: Progress | None = None,
    skip_special_tokens: bool = True,
    speculation: Speculation | None = None,
) -> Iterator[GenerationResponse]:
    """Generate from a prompt (text, or ids used as they are), one response a token.

    cache: one of decoder.make_cache(); its `offset` first positions must hold the prompt's first ids, and are not
    computed again. speculation: guess tokens and check several in a step; it must have been made for this decoder, and the
    text is the same. Generation ends at an end token, a stop string, max_tokens or the end of the context. Everything is
    checked before the first step: ConfigError for an empty prompt, one longer than the context, an id that the model
    does not have, or a number outside what is allowed.
    """
    assert speculation is None or speculation.decoder is decoder
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else _ids(prompt)
    context = check_context(decoder, max_kv_size)
    _check(decoder, ids, context, max_tokens, prefill_step_size)
    tracker = memory.current()
    if tracker is not None:
        tracker.admit(what="a prompt")
    made = cache is None
    if cache is None:
        cache = decoder.make_cache(context)
    if cache.offset >= len(ids):
        raise ConfigError(
            f"[generate] the cache holds {cache.offset} positions and the prompt has {len(ids)}; at least the "
            "prompt's last token must be computed: trim the cache first"
        )
    # The last token generated need not be fed, so one more than the free positions can be made.
    limit = min(max_tokens, context - len(ids) + 1)
    stop_ids = tokenizer.eos_token_ids | frozenset(decoder.config.eos_token_ids)
    plan = _Plan(ids, cache.offset, limit, stop_ids, prefill_step_size)
    sampler = sampling if isinstance(sampling, Sampler) else Sampler(sampling or SamplingConfig())
    text = (StopStrings(stop), Detokenizer(tokenizer, skip_special_tokens))
    stream = _run(decoder, cache, plan, sampler, *text, progress, speculation)
    return _watched(stream, decoder, cache, made)


def _ids(prompt: Sequence[int]) -> list[int]:
    try:
        return [int(index(i)) for i in prompt]
    except TypeError as error:
        raise ConfigError(
            f"[generate] the prompt is {prompt!r:.60}; a text or a list of token ids is needed"
        ) from error


def check_context(decoder: Decoder, max_kv_size: int | None) -> int:
    """How many positions a sequence may have. Raises ConfigError for a max_kv_size that the model does not allow."""
    most = decoder.config.max_position_embeddings
    if max_kv_size is None:
        return most
    if not 1 <= max_kv_size <= most:
        raise ConfigError(f"[generate] max_kv_size is {max_kv_size}; 1 to {most} (this model's context) is allowed")
    return max_kv_size


def _check(decoder: Decoder, ids: Sequence[int], context: int, max_tokens: int, prefill_step_size: int) -> None:
    if max_tokens < 1:
        raise ConfigError(f"[generate] max_tokens is {max_tokens}; it must be at least 1")
    if prefill_step_size < 1:
        raise ConfigError(f"[generate] prefill_step_size is {prefill_step_size}; it must be at least 1")
    if not ids:
        raise ConfigError(
            "[generate] the prompt is empty, and this model has no token that begins a text; give some text"
        )
    if len(ids) > context:
        raise ConfigError(
            f"[generate] the prompt has {len(ids)} tokens and the context holds {context}; shorten the prompt"
            + ("" if context == decoder.config.max_position_embeddings else ", or raise --max-kv-size")
        )
    low, high, vocabulary = min(ids), max(ids), decoder.config.vocab_size
    if low < 0 or high >= vocabulary:
        raise ConfigError(
            f"[generate] the prompt holds token {low if low < 0 else high}; this model has ids up to {vocabulary - 1}: "
            "the tokenizer and the weights are not of one model"
        )


def _prefill(decoder: Decoder, cache: Any, plan: _Plan, progress: Progress | None) -> np.ndarray:
    """Feed the prompt in chunks; the logits after its last token."""
    total, at = len(plan.ids), plan.reused
    logits = np.empty(0, np.float32)
    if progress:
        progress(at, total)
    while at < total:
        chunk = plan.ids[at : at + plan.prefill_step]
        logits = decoder.step([chunk], [cache])[0]
        at += len(chunk)
        if progress:
            progress(at, total)
    return logits


def _run(
    decoder: Decoder,
    cache: Any,
    plan: _Plan,
    sampler: Sampler,
    stops: StopStrings,
    detokenizer: Detokenizer,
    progress: Progress | None,
    speculation: Speculation | None,
) -> Iterator[GenerationResponse]:
    start = time.perf_counter()
    with memory.scope("prefill"):
        logits = _prefill(decoder, cache, plan, progress)
    prompt_s = time.perf_counter() - start
    prompt_tps = (len(plan.ids) - plan.reused) / max(prompt_s, 1e-9)
    history = list(plan.ids)
    first = start
    peak = report = None
    ttft = generation_tps = 0.0
    steps: Steps = PlainSteps(decoder, cache)
    try:
        for count in range(1, plan.limit + 1):
            scores = sampler.scores(logits, history, len(plan.ids))
            if scores is logits:
                scores = logits.copy()  # a decoder may use its buffer again, and the response is the caller's
            token = sampler.pick(scores)
            drafted = steps.chosen(token)
            now = time.perf_counter()
            if count == 1:
                first, ttft, peak = now, now - start, peak_memory_bytes()
            else:
                generation_tps = (count - 1) / max(now - first, 1e-9)
            text, finish = token_text(token, count == plan.limit, plan.stop_ids, detokenizer, stops, sampler.complete)
            if finish:
                peak, report = peak_memory_bytes(), steps.finish()
            yield GenerationResponse(
                text, token, scores, len(plan.ids), prompt_tps, count, generation_tps, ttft, peak, finish, plan.reused,
                drafted, report,
            )  # fmt: skip
            if finish:
                return
            history.append(token)
            if count == 1 and speculation is not None:  # the first token does not wait for what it measures
                steps = speculation.steps(cache, sampler, plan.ids, len(plan.ids) + plan.limit)
            logits = steps.logits(history)
            memory.tick()
    finally:
        steps.finish()


def _watched(
    responses: Iterator[GenerationResponse], decoder: Decoder, cache: Any, made: bool
) -> Iterator[GenerationResponse]:
    """The same stream; a memory tracker in use is told of it, and of its cache."""
    tracker = memory.current()
    if tracker is None:
        yield from responses
        return
    with tracker.scope("generate"):
        tracker.own(cache, "kv_cache", "the stream's cache", keep=not made, on_mlx=decoder.name in ON_MLX)
        yield from responses


def token_text(
    token: int, last: bool, stop_ids: frozenset[int], detokenizer: Detokenizer, stops: StopStrings,
    complete: bool = False,
) -> tuple[str, str | None]:  # fmt: skip
    """(text to show, finish reason or None) of one token; last: no token may follow it, complete: nor need one."""
    ended = token in stop_ids
    text, met = stops.feed("" if ended else detokenizer.add(token))
    if met:
        return text, "stop"
    if not ended and not last and not complete:
        return text, None
    rest, met = stops.feed(detokenizer.finalize())
    text += rest if met else rest + stops.flush()
    return text, "stop" if ended or met or complete else "length"
