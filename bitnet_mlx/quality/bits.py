"""Bits per byte: how many bits a model needs for each byte of UTF-8 text. It compares models of any vocabulary, and xz.

Text longer than the context is read in windows that overlap: each window moves on by `stride` tokens and only targets
that no earlier window scored are counted, so every target but those of the first window has at least
`length - stride` tokens before it. The first token of the stream is never scored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from bitnet_mlx.errors import ConfigError
from bitnet_mlx.models.decoder import Decoder


class Window(NamedTuple):
    """Inputs ids[start:stop], whose targets are ids[start + 1 : stop + 1]; those from index `first` of the stream on count."""

    start: int
    stop: int
    first: int

    @property
    def skip(self) -> int:
        """How many of the window's targets were scored before."""
        return self.first - self.start - 1


def windows(tokens: int, length: int, stride: int) -> Iterator[Window]:
    """Windows of at most `length` inputs over a stream of `tokens` ids; every target 1 .. tokens - 1 counts once.

    The last window reaches back, so that it is as long as the others. Raises ConfigError for a stride outside of 1 .. length.
    """
    if not 1 <= stride <= length:
        raise ConfigError(f"[bits per byte] stride is {stride}; 1 to the window's length, {length}, are allowed")
    if tokens < 2:
        raise ConfigError(f"[bits per byte] the text has {tokens} tokens; at least 2 are needed")
    first, stop = 1, min(length, tokens - 1)
    while True:
        yield Window(max(0, stop - length), stop, first)
        if stop == tokens - 1:
            return
        first, stop = stop + 1, min(stop + stride, tokens - 1)


def bits_per_byte(nats: float, nbytes: int) -> float:
    """Total cross entropy in nats over the bytes of the text it predicts."""
    if nbytes < 1:
        raise ConfigError("[bits per byte] the text is empty; at least one byte is needed")
    return nats / math.log(2) / nbytes


def negative_log_likelihood(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """float32 logits [L, V] and ids [L] -> nats, float64 [L]."""
    wide = logits.astype(np.float64)
    top = wide.max(axis=-1)
    total = np.log(np.exp(wide - top[:, None]).sum(axis=-1)) + top
    return total - wide[np.arange(len(targets)), targets]


def scored_logits(decoder: Decoder, ids: Sequence[int] | np.ndarray, window: Window, length: int) -> np.ndarray:
    """float32 [scored, vocab]: what a decoder with a cache of `length` makes of a window, for the targets that count."""
    inputs = [int(i) for i in ids[window.start : window.stop]]
    [logits] = decoder.step([inputs], [decoder.make_cache(limit=length)], logits="all")
    return logits[window.skip :]


def total_nats(decoder: Decoder, ids: np.ndarray, length: int, stride: int) -> float:
    """Cross entropy of ids [tokens] under any decoder, summed over all targets, in nats."""
    nats = 0.0
    for window in windows(len(ids), length, stride):
        targets = ids[window.first : window.stop + 1].astype(np.int64)
        nats += float(negative_log_likelihood(scored_logits(decoder, ids, window, length), targets).sum())
    return nats
