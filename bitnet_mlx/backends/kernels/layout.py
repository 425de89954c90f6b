"""The forms in which quantised activations lie in memory for the products: written by the quantise kernels.

    halves  half-mantissa form, for words2 on Metal: a float16 for each activation, scaled and ordered so that codes of
            a word become halves by masks alone; and what the masks add, for each lane of a simdgroup
    trits   float16, ordered for trits5 words of 20 weights
    bytes   int8, ordered so that four codes of a word2 word meet four neighbouring bytes (dp4a, mma)
    plain   float16 in their own order, for simdgroup matrices

A row is one run of 32-bit words: the codes, then as float32 its biases and its scale s, then up to three words of 0, so
that every row starts at a multiple of 16 bytes. One array for all of it: an array less is a cheaper launch.
`prepare` is the definition, in numpy, and `parts` its inverse; codes past K are 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from bitnet_mlx.ternary import CODES_PER_WORD, padded

LANES = 32
ROW_WORDS = 4  # a row of activations is a multiple of so many 32-bit words
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
        """float32 values after a row's codes: two for each lane (halves), else one, the sum of the row's codes."""
        return 2 * LANES if self.kind == "halves" else 1

    def width(self, k: int) -> int:
        """Prepared activations of a row of K."""
        return -(-k // TRITS_PER_WORD) * TRITS_PER_WORD if self.kind == "trits" else padded(k)

    def code_words(self, k: int) -> int:
        """32-bit words of a row's codes."""
        return self.width(k) // (4 if self.kind == "bytes" else 2)

    def stride(self, k: int) -> int:
        """32-bit words of a row."""
        return -(-(self.code_words(k) + self.biases + 1) // ROW_WORDS) * ROW_WORDS


def halves(k: int) -> Layout:
    """The half-mantissa layout for K: as many words a load as leave the fewest lanes idle."""
    words = padded(k) // CODES_PER_WORD

    def idle(w: int) -> int:
        return -(words // w) % LANES * w

    return Layout("halves", min((4, 2, 1), key=idle))


def prepare(q: np.ndarray, s: np.ndarray, layout: Layout) -> np.ndarray:
    """int8 q [M, K] and float32 s [M] -> uint32 [M, layout.stride(K)]."""
    m, k = q.shape
    codes, biases = _codes(q, layout)
    words = layout.code_words(k)
    x = np.zeros((m, layout.stride(k)), np.uint32)
    x[:, :words] = codes.view(np.uint32)
    x[:, words : words + layout.biases] = biases.view(np.uint32)
    x[:, words + layout.biases] = np.asarray(s, np.float32).view(np.uint32)
    return x


def parts(x: np.ndarray, layout: Layout, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """uint32 [M, stride] -> (codes [M, width] in layout.dtype, biases float32 [M, layout.biases], s float32 [M])."""
    words = layout.code_words(k)
    codes, tail = np.ascontiguousarray(x[:, :words]), np.ascontiguousarray(x[:, words:]).view(np.float32)
    return codes.view(layout.dtype), tail[:, : layout.biases], tail[:, layout.biases]


def _codes(q: np.ndarray, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """(codes [M, width], biases [M, layout.biases])."""
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
