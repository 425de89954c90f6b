"""How far two decoders agree on one sequence, in the terms that whole models can promise.

Engines differ by float rounding in norms, RoPE, softmax and the head. A difference of 1e-7 now and then moves an input
across a rounding boundary of the int8 quantiser (a flip), and one flip moves logits by a few percent of their spread.
So logits are compared where no flip can have reached them, flips are counted, and greedy tokens are compared where the
reference's two best logits are further apart than a margin.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bitnet_mlx.errors import ConfigError

_LAYER = re.compile(r"layers\.(\d+)\.")
_BEFORE_CACHE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@dataclass(frozen=True)
class Trace:
    """What one decoder computed for one sequence of L tokens.

    logits: float32 [P, vocab], after the tokens at `positions`. positions: int [P], ascending.
    codes: by module name, [L, K]: the int8 inputs of the quantised linears; or anything [L, ...] that stands for them,
    such as a checksum of each row. Empty where nothing is quantised. layers: how many layers the model has.
    """

    logits: np.ndarray
    positions: np.ndarray
    codes: Mapping[str, np.ndarray] = field(default_factory=dict)
    layers: int = 0


@dataclass(frozen=True)
class Agreement:
    """What `compare` found.

    positions: how many were compared. codes: int8 codes compared.
    flips: codes that differ, over all linears. roots: flips that no other flip can have caused.
    flipped: positions with a flip of their own. untouched: positions that no flip can have reached.
    max_difference: the largest |logits - reference logits|; the other is the same over untouched positions (0 if none).
    margin: in logits. decided: positions where the reference's best logit leads by more than that.
    disagreements: decided positions where the other decoder's best token is another one.
    """

    positions: int
    codes: int
    flips: int
    roots: int
    flipped: int
    untouched: int
    max_difference_where_codes_agree: float
    max_difference: float
    margin: float
    decided: int
    disagreements: int

    @property
    def greedy_equal_above_margin(self) -> bool:
        """Whether the best tokens are equal wherever the reference's margin is above `margin`."""
        return self.disagreements == 0

    def __str__(self) -> str:
        return (
            f"{self.flips} of {self.codes} codes differ ({self.roots} not caused by another), at {self.flipped} of "
            f"{self.positions} positions; logits within "
            f"{self.max_difference_where_codes_agree:.2g} at the {self.untouched} positions that no flip reaches, "
            f"{self.max_difference:.2g} in all; best token differs at {self.disagreements} of the {self.decided} "
            f"positions with a margin above {self.margin:g}"
        )


def record(decoder: Any, tokens: Sequence[int], chunk: int | None = None) -> Trace:
    """Run a decoder over `tokens` from an empty cache and keep its logits and, where it has `observe`, its codes.

    chunk: how many tokens to feed at a time; all at once by default. `observe` is an attribute of the decoder that,
    where it is not None, is called with (module name, int8 codes [M, K]); it is put back afterwards.
    """
    codes: dict[str, list[np.ndarray]] = {}
    size = chunk or len(tokens)
    cache = decoder.make_cache()
    observable = hasattr(decoder, "observe")
    before = decoder.observe if observable else None
    if observable:
        decoder.observe = lambda name, q: codes.setdefault(name, []).append(np.array(q))
    try:
        parts = [decoder.step([tokens[at : at + size]], [cache], "all")[0] for at in range(0, len(tokens), size)]
    finally:
        if observable:
            decoder.observe = before
    joined = {name: np.concatenate(rows) for name, rows in codes.items()}
    return Trace(np.concatenate(parts), np.arange(len(tokens)), joined, decoder.config.num_hidden_layers)


def compare(reference: Trace, other: Trace, margin: float) -> Agreement:
    """Compare `other` with `reference` at the reference's positions.

    `other` must cover them, and hold codes for the reference's modules. margin: in logits.
    Raises ConfigError where the two do not fit each other.
    """
    if set(reference.codes) - set(other.codes):
        missing = sorted(set(reference.codes) - set(other.codes))
        raise ConfigError(f"[compare] the other trace lacks the codes of {', '.join(missing[:4])}; record both alike")
    index = np.searchsorted(other.positions, reference.positions)
    if np.any(index >= len(other.positions)) or np.any(other.positions[index] != reference.positions):
        raise ConfigError("[compare] the other trace lacks positions of the reference; record all of them")
    flips, roots, own, reached = _flips(reference, other)
    difference = np.abs(other.logits[index] - reference.logits).max(axis=-1)
    best = np.sort(reference.logits, axis=-1)[:, -2:]
    decided = best[:, 1] - best[:, 0] > margin
    wrong = decided & (other.logits[index].argmax(-1) != reference.logits.argmax(-1))
    return Agreement(
        positions=len(index),
        codes=sum(c.size for c in reference.codes.values()),
        flips=flips,
        roots=roots,
        flipped=int(own.sum()),
        untouched=int((~reached).sum()),
        max_difference_where_codes_agree=float(difference[~reached].max(initial=0.0)),
        max_difference=float(difference.max(initial=0.0)),
        margin=margin,
        decided=int(decided.sum()),
        disagreements=int(wrong.sum()),
    )


def _stage(name: str) -> tuple[int, int]:
    """(layer, 0 before attention or 1 after it) of a linear."""
    layer = _LAYER.search(name)
    if layer is None:
        raise ConfigError(
            f"[compare] codes of {name} name no layer; module names such as model.layers.0.mlp.down_proj are needed"
        )
    return int(layer[1]), 0 if name.endswith(_BEFORE_CACHE) else 1


def _flips(reference: Trace, other: Trace) -> tuple[int, int, np.ndarray, np.ndarray]:
    """Differing codes; those that no other flip can have caused; by position: has it a flip, can one have reached it.

    Walks the model in the order of computation. A flip reaches its own position from there on, and every later position
    through the keys and values of the next attention.
    """
    length = max((len(c) for c in reference.codes.values()), default=int(reference.positions.max(initial=-1)) + 1)
    own, reached = np.zeros(length, bool), np.zeros(length, bool)
    flips = roots = attended = 0
    for name in sorted(reference.codes, key=_stage):
        layer, after = _stage(name)
        if attended < layer + after:
            reached, attended = np.logical_or.accumulate(reached), layer + after
        where, counts = _differing(reference, other, name)
        flips += int(counts.sum())
        roots += int(counts[~reached[where]].sum())
        own[where] = reached[where] = True
    if attended < reference.layers:
        reached = np.logical_or.accumulate(reached)
    return flips, roots, own[reference.positions], reached[reference.positions]


def _differing(reference: Trace, other: Trace, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The positions at which one linear's codes differ, and how many codes at each."""
    expected, found = reference.codes[name], other.codes[name]
    if found.shape != expected.shape:
        raise ConfigError(
            f"[compare] codes of {name} are {found.shape}; the reference has {expected.shape}; "
            "feed both the same tokens"
        )
    counts = (found != expected).reshape(len(expected), -1).sum(axis=1)
    where = np.flatnonzero(counts)
    return where, counts[where]
