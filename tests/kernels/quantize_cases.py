"""Rows for the quantise kernel, and their codes and scales by float64 operations, each rounded to float32.

float64 has more than twice float32's bits, so that is the correctly rounded result of +, -, *, / and the square root.
Only SiLU is taken from numpy_ref: its e^x is defined by a polynomial there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import ml_dtypes
import numpy as np

from bitnet_mlx.backends import numpy_ref
from bitnet_mlx.backends.kernels.launch import Launch
from bitnet_mlx.backends.kernels.layout import Layout, parts, prepare
from bitnet_mlx.backends.kernels.quantize import quantize
from tests.backend.shapes import expected_codes, f32, half_even, inputs, same

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
LAYOUTS = [
    Layout("halves"),
    Layout("halves", 2),
    Layout("halves", 4),
    Layout("trits"),
    Layout("bytes"),
    Layout("plain"),
]
K_NARROW = (8, 10, 100, 128, 2560)  # in the kernel's smaller form
K_WIDE = (6912, 12288, 20000)  # one turn of its larger form, two, three
_LARGE = 6e4  # within float16


@dataclass(frozen=True)
class Case:
    """What a launch quantises, without its width."""

    dtype: str
    layout: Layout
    norm: bool = False
    act: str | None = None
    eps: float = 1e-5

    def launch(self, k: int, rows: int = 17) -> Launch:
        """Quantise the first `rows` rows of K."""
        x, weight, _ = rows_of(self.dtype, self.act, k)
        norm = weight if self.norm else None
        return quantize(x[:rows], layout=self.layout, dtype=self.dtype, norm=norm, eps=self.eps, act=self.act)

    def expected(self, k: int, rows: int = 17) -> np.ndarray:
        """The launch's output."""
        q, s = codes(self.dtype, self.act, self.norm, self.eps, k)
        return prepare(q[:rows], s[:rows], self.layout)


def same_rows(found: np.ndarray, expected: np.ndarray, layout: Layout, k: int, label: str) -> None:
    """Fail, naming what differs first, unless two arrays of rows in a layout are the same bits."""
    assert found.dtype == expected.dtype
    both = zip(("codes", "biases", "scales"), parts(found, layout, k), parts(expected, layout, k), strict=True)
    for name, values, wanted in both:
        same(values, wanted, f"{name} of {label}")
    same(found, expected, f"bits of {label}")


@lru_cache(maxsize=32)
def rows_of(dtype: str, act: str | None, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x [17, K or 2 K] of dtype, the norm's weight float32 [K], what is quantised float32 [17, K])."""
    rng = np.random.default_rng((k, 2))
    weight = rng.uniform(-2, 2, k).astype(np.float32)
    weight[rng.integers(k, size=1 + k // 9)] = 1
    x = inputs(k)
    x[12] *= np.float32(1e-8)  # a norm in front of it does not lift it above the quantiser's floor
    if act is not None:
        x[9] *= np.float32(1e-9)  # its cube is a float32, and the square of that
    if dtype == "float16" or act is not None:
        x = np.clip(x, -_LARGE, _LARGE)
    if act is None:
        x = x.astype(DTYPES[dtype])
        return x, weight, x.astype(np.float32)
    gate = x.astype(DTYPES[dtype])
    gate[0, :5] = (-100, 100, -88, 0, -0.0)  # both ends of the exponential
    up = np.roll(x, 4, axis=0).astype(DTYPES[dtype])
    wide, across = gate.astype(np.float32), up.astype(np.float32)
    if act == "silu":
        hidden = numpy_ref.gated(wide, across, act)
    else:
        positive = np.maximum(wide, 0).astype(np.float64)
        hidden = f32(f32(positive * positive) * across).astype(np.float32)
    return np.concatenate([gate, up], axis=1), weight, hidden


@lru_cache(maxsize=128)
def codes(dtype: str, act: str | None, norm: bool, eps: float, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(q int8 [17, K], s float32 [17])."""
    _, weight, v = rows_of(dtype, act, k)
    return norm_codes(v, weight, eps) if norm else expected_codes(v)


def reference(dtype: str, act: str | None, eps: float, k: int) -> tuple[np.ndarray, np.ndarray]:
    """codes with a norm, by numpy_ref alone."""
    x, weight, v = rows_of(dtype, act, k)
    if act is not None:
        v = numpy_ref.gated(x[:, :k].astype(np.float32), x[:, k:].astype(np.float32), act)
    return numpy_ref.norm_quantize(v, weight, eps)


def lane_sum(v: np.ndarray) -> np.ndarray:
    """The 32 lanes' sum of float32 values [M, K], held as float64."""
    lanes = np.zeros((v.shape[0], 32))
    for at in range(0, v.shape[1], 32):
        line = v[:, at : at + 32]
        lanes[:, : line.shape[1]] = f32(lanes[:, : line.shape[1]] + line)
    for half in (16, 8, 4, 2, 1):
        lanes = f32(lanes[:, :half] + lanes[:, half:])
    return lanes[:, 0]


def norm_codes(x: np.ndarray, weight: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """(q int8 [M, K], s float32 [M]) of float32 x [M, K] behind an RMSNorm."""
    v, floor = x.astype(np.float64), np.float64(np.float32(1e-5))
    mean = f32(lane_sum(f32(v * v)) / x.shape[1])
    r = f32(1 / f32(np.sqrt(f32(mean + np.float64(np.float32(eps))))))
    p = f32(v * weight.astype(np.float64))
    a = np.abs(p).max(axis=1)
    c = np.where(f32(a * r) >= floor, a, f32(floor / r))
    q = np.clip(half_even(f32(p * f32(127 / c)[:, None])), -128, 127)
    return q.astype(np.int8), f32(127 / f32(c * r)).astype(np.float32)
