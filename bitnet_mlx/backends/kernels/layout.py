"""The forms in which quantised activations lie in memory for the products: written by the quantise kernels.

    halves  half-mantissa form, for words2 on Metal: a float16 for each activation, scaled and ordered so that codes of
            a word become halves by masks alone; and what the masks add, for each lane of a simdgroup
    trits   float16, ordered for trits5 words of 20 weights
    bytes   int8, ordered so that four codes of a word2 word meet four neighbouring bytes (dp4a, mma)
    plain   float16 in their own order, for simdgroup matrices

`prepare` is the definition, in numpy; rows past K hold 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from bitnet_mlx.ternary import CODES_PER_WORD, padded

LANES = 32
TRITS_PER_WORD = 20
Kind = Literal["halves", "trits", "bytes", "plain"]
KINDS: tuple[Kind, ...] = ("halves", "trits", "bytes", "plain")  # the index is the kernels' LAYOUT

# Code positions p and p + 8 of a word are read in one step; the factor on the activation, exact in float16 ...
HALF_SCALE = (1.0, 2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**5, -(2.0**2), -(2.0**-10))
# ... and what the masks' exponent and the code's + 1 add, in units of HALF_UNIT for each unit of activation.
HALF_BIAS = (1 + 1024.0, 1 + 256.0, 1 + 64.0, 1 + 16.0, 1 + 4.0, 1.0, 0.0, 0.0)
HALF_UNIT = 2.0**-9  # the value of one x * t in the accumulator
HALF_LIMIT = 48_640  # the widest K for which every partial sum stays a whole number of units below 2^24


@dataclass(frozen=True)
class Layout:
    """kind, and for halves the words that a lane loads at once (1, 2 or 4), which decide whose bias a word's is."""

    kind: Kind
    words: int = 1

    @property
    def index(self) -> int:
        """The number that the kernels know the kind by."""
        return KINDS.index(self.kind)

    @property
    def dtype(self) -> str:
        """The dtype's name of the prepared activations."""
        return "int8" if self.kind == "bytes" else "float16"

    @property
    def biases(self) -> int:
        """float32 values beside each row: two for each lane (halves), else one, the sum of the row's codes."""
        return 2 * LANES if self.kind == "halves" else 1

    def width(self, k: int) -> int:
        """Prepared activations of a row of K."""
        return -(-k // TRITS_PER_WORD) * TRITS_PER_WORD if self.kind == "trits" else padded(k)


def halves(k: int) -> Layout:
    """The half-mantissa layout for K: as many words a load as leave the fewest lanes idle."""
    words = padded(k) // CODES_PER_WORD

    def idle(w: int) -> int:
        return -(words // w) % LANES * w

    return Layout("halves", min((4, 2, 1), key=idle))


def prepare(q: np.ndarray, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """int8 q [M, K] -> (prepared [M, width], biases float32 [M, layout.biases])."""
    m, k = q.shape
    x = np.zeros((m, layout.width(k)), np.float64)
    x[:, :k] = q
    total = x.sum(axis=1, keepdims=True).astype(np.float32)
    if layout.kind == "plain":
        return x.astype(np.float16), total
    if layout.kind == "bytes":  # [word, i, j] -> [word, j, i]: code j + 4 i
        return x.reshape(m, -1, 4, 4).swapaxes(2, 3).reshape(m, -1).astype(np.int8), total
    if layout.kind == "trits":  # [word, byte pair member, byte, digit] -> [word, byte, digit, member]
        return x.reshape(m, -1, 2, 2, 5).transpose(0, 1, 3, 4, 2).reshape(m, -1).astype(np.float16), total
    words = x.reshape(m, -1, 2, 8)  # word, half, p
    scaled = (words * HALF_SCALE).swapaxes(2, 3).reshape(m, -1)
    added = (words * HALF_BIAS).sum(axis=3) * HALF_UNIT  # [M, word, half]
    lane = np.arange(words.shape[1]) // layout.words % LANES
    bias = np.zeros((m, LANES, 2))
    for i in range(m):
        np.add.at(bias[i], lane, added[i])
    return scaled.astype(np.float16), bias.reshape(m, -1).astype(np.float32)
