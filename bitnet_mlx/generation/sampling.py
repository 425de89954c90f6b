"""From logits to a token: float32 numpy, one seeded generator per request.

The filters, their names, their order and their meaning are mlx-lm's (sample_utils): logit bias, repetition penalty,
then on log probabilities top-p, min-p, top-k, and the temperature last, over what the filters kept. Presence and frequency
penalties, as OpenAI's API has them, come after the repetition penalty.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from bitnet_mlx.errors import BackendError, ConfigError
from bitnet_mlx.generation.grammar import Constraint

_MARGINS = (4.0, 10.0, 20.0)  # how far below the best log probability the filters look before they sort everything
_COLD = 1e-6  # a temperature below this counts as 0
_BLOCK = 512  # weights added up at once when a token is drawn


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen.

    temp 0 takes the most likely token (the lowest id of equals). top_p 0 or 1, top_k 0, min_p 0 and repetition_penalty
    1 leave their filter out. logit_bias adds to the logits of given ids. presence_penalty is taken from the logit of each
    token generated so far, frequency_penalty as many times as it was generated; the prompt's tokens do not count. Without
    a seed the system gives one.
    """

    temp: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_context_size: int = 20
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError naming the field and what it may be."""
        _number(self, "temp", "at least 0", lambda v: v >= 0)
        _number(self, "top_p", "from 0 to 1", lambda v: 0 <= v <= 1)
        _integer(self, "top_k", 0)
        _number(self, "min_p", "from 0 to 1", lambda v: 0 <= v <= 1)
        _number(self, "repetition_penalty", "above 0 (1 for none)", lambda v: v > 0)
        _integer(self, "repetition_context_size", 0)
        _number(self, "presence_penalty", "from -2 to 2", lambda v: -2 <= v <= 2)
        _number(self, "frequency_penalty", "from -2 to 2", lambda v: -2 <= v <= 2)
        if self.seed is not None:
            _integer(self, "seed", 0)
        for token, bias in self.logit_bias.items():
            if not _is_integer(token) or token < 0 or not isinstance(bias, (int, float)) or not bias < math.inf:
                raise ConfigError(
                    f"[sampling] logit_bias has {token!r}: {bias!r}; "
                    "a token id and a number (-inf forbids the token) are allowed"
                )

    @staticmethod
    def from_generation_config(table: Mapping[str, Any]) -> SamplingConfig:
        """What a model's generation_config.json asks for; greedy unless do_sample is true, as in transformers.

        Raises ConfigError for a value that is not allowed.
        """
        wanted: dict[str, Any] = {}
        sampled = table.get("do_sample") is True
        names = {"temperature": "temp", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"} if sampled else {}
        for theirs, ours in {**names, "repetition_penalty": "repetition_penalty"}.items():
            if table.get(theirs) is not None:
                wanted[ours] = table[theirs]
        if sampled:
            wanted.setdefault("temp", 1.0)
        try:
            return SamplingConfig(**wanted)
        except ConfigError as error:
            raise ConfigError(
                f"{error} (from generation_config.json; the command line can set it otherwise)"
            ) from error

    def replaced(self, **changes: Any) -> SamplingConfig:
        """A copy with those changes that are not None."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return SamplingConfig(**{**values, **{name: value for name, value in changes.items() if value is not None}})


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _integer(config: SamplingConfig, name: str, least: int) -> None:
    value = getattr(config, name)
    if not _is_integer(value) or value < least:
        raise ConfigError(f"[sampling] {name} is {value!r}; an integer of at least {least} is allowed")


def _number(config: SamplingConfig, name: str, allowed: str, test: Any) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or not test(value):
        raise ConfigError(f"[sampling] {name} is {value!r}; a number {allowed} is allowed")


class Sampler:
    """One request's sampler; its random generator (PCG64, one draw a token) and its constraint advance with every pick."""

    def __init__(self, config: SamplingConfig, constraint: Constraint | None = None) -> None:
        """constraint: what the text must be; tokens that it forbids are never picked."""
        self.config = config
        self._constraint = constraint
        self._random = np.random.Generator(np.random.PCG64(config.seed))
        self._coming: deque[float] = deque()  # draws that were looked at before their turn
        self._bias: tuple[np.ndarray, np.ndarray] | None = None
        if config.logit_bias:
            ids, values = list(config.logit_bias), list(config.logit_bias.values())
            self._bias = (np.asarray(ids, np.int64), np.asarray(values, np.float32))

    def sample(self, logits: np.ndarray, history: Sequence[int] = ()) -> tuple[int, float]:
        """(token, its log probability). logits: float32 [vocab], unchanged; history: the ids so far with the prompt."""
        scores = self.scores(logits, history)
        token = self.pick(scores)
        return token, float(log_softmax(scores)[token])

    def scores(self, logits: np.ndarray, history: Sequence[int] = (), prompt_tokens: int = 0) -> np.ndarray:
        """The logits after bias and penalties: float32 [vocab]; a new array only where something changed.

        prompt_tokens: how many of history's first ids were not generated. Raises ConfigError for a biased id outside
        the vocabulary.
        """
        config = self.config
        x = np.asarray(logits, np.float32)
        if self._bias is not None:
            ids, values = self._bias
            if ids.max() >= len(x):
                raise ConfigError(
                    f"[sampling] logit_bias names token {ids.max()}; this model has the ids 0 to {len(x) - 1}"
                )
            x = x.copy()
            x[ids] += values
        if config.repetition_penalty != 1 and config.repetition_context_size and len(history):
            recent = np.asarray(history[-config.repetition_context_size :], np.int64)
            seen = x[recent]
            x = x.copy()
            penalty = np.float32(config.repetition_penalty)
            x[recent] = np.where(seen < 0, seen * penalty, seen / penalty)
        if (config.presence_penalty or config.frequency_penalty) and len(history) > prompt_tokens:
            ids, counts = np.unique(np.asarray(history[prompt_tokens:], np.int64), return_counts=True)
            x = x.copy()
            x[ids] -= np.float32(config.presence_penalty) + np.float32(config.frequency_penalty) * counts.astype(
                np.float32
            )
        return x

    @property
    def complete(self) -> bool:
        """Whether the constraint lets nothing but the text's end follow."""
        return self._constraint is not None and self._constraint.complete

    def pick(self, scores: np.ndarray, ahead: int | None = None) -> int:
        """Choose by the constraint, the temperature and the filters. Raises BackendError when a score is NaN or +inf.

        ahead: choose as the pick after `ahead` others will, were these its scores; its draw is looked at and stays, and no
        constraint is known yet.
        """
        if self._constraint is None or ahead is not None:
            return self._choose(scores, ahead)
        token = self._choose(self._constraint.masked(scores), ahead)
        self._constraint.accept(token)
        return token

    def _choose(self, scores: np.ndarray, ahead: int | None) -> int:
        best = int(scores.argmax())  # a NaN counts as the largest
        if not math.isfinite(scores[best]):
            raise BackendError(
                f"[sampling] the largest logit is {scores[best]}; finite numbers are needed; the weights are "
                "damaged or a half-precision type overflowed: try --dtype float32"
            )
        if self.config.temp < _COLD:
            return best
        logprobs = log_softmax(scores)
        kept = self.kept(logprobs)
        x = logprobs if kept is None else logprobs[kept]
        at = _draw(np.exp((x - x.max()) / np.float32(self.config.temp)), self._uniform(ahead))
        return at if kept is None else int(kept[at])

    def _uniform(self, ahead: int | None) -> float:
        while len(self._coming) <= (ahead or 0):
            self._coming.append(self._random.random())
        return self._coming.popleft() if ahead is None else self._coming[ahead]

    def kept(self, logprobs: np.ndarray) -> np.ndarray | None:
        """Ids that pass the filters, ascending: int64; None where all do."""
        config = self.config
        ids: np.ndarray | None = None
        if 0 < config.top_p < 1:
            ids = top_p_ids(logprobs, config.top_p)
        if config.min_p > 0:
            ids = _within(ids, min_p_ids(logprobs if ids is None else logprobs[ids], config.min_p))
        if config.top_k > 0:
            ids = _within(ids, top_k_ids(logprobs if ids is None else logprobs[ids], config.top_k))
        return ids


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Log probabilities: float32, a new array."""
    shifted = x - x.max()
    shifted -= np.log(np.exp(shifted).sum())
    return shifted


def _draw(weights: np.ndarray, uniform: float) -> int:
    """The index at which the running sum of weights passes uniform * total: blocks first, then inside one block."""
    starts = np.arange(0, len(weights), _BLOCK)
    sums = np.cumsum(np.add.reduceat(weights, starts), dtype=np.float64)
    goal = uniform * sums[-1]
    block = min(int(np.searchsorted(sums, goal, side="right")), len(sums) - 1)
    inside = np.cumsum(weights[block * _BLOCK : (block + 1) * _BLOCK], dtype=np.float64)
    goal -= sums[block - 1] if block else 0.0
    # Two ways of adding differ in the last bits: what falls past the end belongs to the last weight that is not 0.
    at = int(np.searchsorted(inside, goal, side="right"))
    if at == len(inside):
        at = int(np.searchsorted(inside, inside[-1], side="left"))
    return block * _BLOCK + at


def _within(ids: np.ndarray | None, chosen: np.ndarray) -> np.ndarray:
    return chosen if ids is None else ids[chosen]


def _candidates(logprobs: np.ndarray) -> Iterator[np.ndarray]:
    """Ids that are near the most likely one, then more and more, at last all: what is sorted stays small."""
    top = logprobs.max()
    for margin in _MARGINS:
        yield np.flatnonzero(logprobs >= top - margin)
    yield np.arange(len(logprobs))


def top_p_ids(logprobs: np.ndarray, top_p: float) -> np.ndarray:
    """The most likely ids whose predecessors hold less than top_p of the mass, with all equals of the last: ascending.

    logprobs: normalised, so that the mass is 1.
    """
    ids, threshold = np.arange(0), np.float32(-np.inf)
    for ids in _candidates(logprobs):
        sorted_ = np.sort(logprobs[ids])[::-1]
        mass = np.cumsum(np.exp(sorted_), dtype=np.float64)
        last = int(np.searchsorted(mass, top_p, side="left"))
        if last < len(mass):
            threshold = sorted_[last]
            break
    return ids[logprobs[ids] >= threshold]


def min_p_ids(logprobs: np.ndarray, min_p: float) -> np.ndarray:
    """Ids at least min_p times as likely as the most likely one: ascending."""
    return np.flatnonzero(logprobs >= logprobs.max() + np.float32(math.log(min_p)))


def top_k_ids(logprobs: np.ndarray, top_k: int) -> np.ndarray:
    """The top_k most likely ids, of equals the lowest: ascending. All of them where there are no more than top_k."""
    if top_k >= len(logprobs):
        return np.arange(len(logprobs))
    ids = next(ids for ids in _candidates(logprobs) if len(ids) >= top_k)
    # Stable: of equals the lowest id comes first.
    return np.sort(ids[np.argsort(-logprobs[ids], kind="stable")[:top_k]])
