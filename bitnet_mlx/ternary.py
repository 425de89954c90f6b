"""The arithmetic of BitNet b1.58 (W1.58A8) in numpy: the definition that every backend follows to the last bit.

Weights     m = max(mean|W|, 1e-5) over the tensor; t = clip(rint(W * (1/m)), -1, 1); w = t * m.
Activations s = 127 / max(max|x|, 1e-5) for each token; q = clip(rint(x * s), -128, 127), half to even.
Product     acc = q . t, an integer below 2^24, so float32 holds it exactly in any order of summation.
Output      y = (acc / s) * scale, float32, in this order; with groups along K the groups are added in ascending order.

A ternary weight is stored as MLX's 2-bit code words ("words2"): uint32, 16 codes each, low bits first, code = t + 1.
Rows are padded to a multiple of 128 codes with code 1, which is the weight 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bitnet_mlx.errors import FormatError

GROUP = 128  # codes a row is padded to, and the size of a scale group
CODES_PER_WORD = 16
MIN_SCALE = np.float32(1e-5)
SCALES = ("tensor", "row", "group")  # what a scale of 0, 1 or 2 dimensions stands for
ZERO_WORD = np.uint32(0x55555555)  # sixteen codes 1


def padded(k: int) -> int:
    """K rounded up to a whole number of groups of 128 codes."""
    return -(-k // GROUP) * GROUP


@dataclass(frozen=True)
class TernaryTensor:
    """A linear layer's weight, N outputs by K inputs, in 2-bit code words.

    words: uint32 [N, padded(K) / 16], code t + 1, low bits first, padding code 1.
    scale: float32, what a weight of 1 stands for: [] for the tensor, [N] for each row, [N, padded(K) / 128] for groups along K.
    shape: (N, K).
    activation_bits: 8 where inputs are quantised to int8, 16 where they stay in floating point.
    """

    words: np.ndarray
    scale: np.ndarray
    shape: tuple[int, int]
    activation_bits: int = 8

    def __post_init__(self) -> None:
        n, k = self.shape
        expected = (n, padded(k) // CODES_PER_WORD)
        if self.words.dtype != np.uint32 or self.words.shape != expected:
            raise FormatError(
                f"[TernaryTensor] words are {self.words.dtype} {self.words.shape}; "
                f"a weight of shape {self.shape} needs uint32 {expected}"
            )
        allowed = ((), (n,), (n, padded(k) // GROUP))
        if self.scale.dtype != np.float32 or self.scale.shape not in allowed:
            raise FormatError(
                f"[TernaryTensor] scale is {self.scale.dtype} {self.scale.shape}; "
                f"a weight of shape {self.shape} takes float32 of shape {' or '.join(map(str, allowed))}"
            )
        if self.activation_bits not in (8, 16):
            raise FormatError(f"[TernaryTensor] activation_bits is {self.activation_bits}; 8 or 16 are allowed")

    @property
    def groups(self) -> int:
        """How many scales a row has along K: 1, or padded(K) / 128."""
        return self.scale.shape[1] if self.scale.ndim == 2 else 1

    @property
    def nbytes(self) -> int:
        """Bytes of the words and the scales."""
        return self.words.nbytes + self.scale.nbytes

    def rows(self, index: np.ndarray | slice) -> np.ndarray:
        """The chosen rows as float32 [.., K], scaled: what an embedding look-up needs."""
        from bitnet_mlx.formats import words2

        t = words2.unpack(self.words[index], self.shape[1]).astype(np.float32)
        if self.scale.ndim == 0:
            return t * self.scale
        scale = self.scale[index]
        if scale.ndim == 1:
            return t * scale[:, None]
        return t * np.repeat(scale, GROUP, axis=1)[:, : self.shape[1]]


def matmul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a @ b of floats, without warnings: Apple's Accelerate, numpy's BLAS on macOS, raises floating-point flags at random,
    which numpy below 2.3.5 reports as "divide by zero encountered in matmul" (numpy issue 28687)."""
    with np.errstate(divide="ignore", over="ignore", under="ignore", invalid="ignore"):
        return a @ b


def ternarize(w: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """Absmean ternarisation of a float weight (BitNet b1.58, section 2).

    w: float array of any shape. Returns (t, m): int8 of the same shape with values -1, 0, 1, and the float32 scale m.
    The mean of |W| is taken in float64 and rounded once, so it does not depend on the order of summation.
    Raises FormatError if a value is not finite.
    """
    w = np.asarray(w, dtype=np.float32)
    total = np.abs(w).sum(dtype=np.float64)
    if not np.isfinite(total):
        raise FormatError("[ternarize] the weight holds NaN or infinity; only finite values can be ternarised")
    m = max(np.float32(total / max(w.size, 1)), MIN_SCALE)
    t = np.clip(np.rint(w * (np.float32(1) / m)), -1, 1).astype(np.int8)
    return t, m


def quantize_activations(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per-token int8 quantisation: x [..., K] -> (q int8 [..., K], s float32 [...]), with x close to q / s."""
    x = np.asarray(x, dtype=np.float32)
    s = np.float32(127) / np.maximum(np.abs(x).max(axis=-1), MIN_SCALE)
    q = np.clip(np.rint(x * s[..., None]), -128, 127).astype(np.int8)
    return q, s


def scale_output(acc: np.ndarray, s: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Accumulators to outputs: (acc / s) * scale in float32, in this order.

    acc: integers [M, N], or [M, G, N] where the weight has G groups along K.
    s: float32 [M], the activations' scales. scale: float32 [] or [N], or [N, G].
    """
    acc = acc.astype(np.float32)
    if scale.ndim < 2:
        return (acc / s[:, None]) * scale
    y = np.zeros((acc.shape[0], acc.shape[2]), np.float32)
    for g in range(acc.shape[1]):
        y += (acc[:, g] / s[:, None]) * scale[:, g]
    return y
