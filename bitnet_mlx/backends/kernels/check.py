"""Whether a kernel gives the reference's values on the device that runs it: every output is compared, for equality."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitnet_mlx.backends import numpy_ref
from bitnet_mlx.backends.kernels import problem
from bitnet_mlx.backends.kernels.launch import Launch
from bitnet_mlx.backends.kernels.layout import HALF_SCALE, Layout, parts, prepare
from bitnet_mlx.backends.kernels.products import Candidate, Runner
from bitnet_mlx.backends.kernels.run import DTYPES
from bitnet_mlx.backends.mlx_import import mx
from bitnet_mlx.errors import BitnetError
from bitnet_mlx.ternary import quantize_activations

# What a kernel that does not compile or cannot be launched raises: MLX's own errors and ours.
FAILURES = (RuntimeError, ValueError, BitnetError)
EXTRAS = ((False, False), (False, True), (True, False), (True, True))  # (bias, residual)
_NEAR_TIE = 2e-3  # how far from a half a value may be that a rounding moves to the other side
_ULPS = 4  # by how many units in the last place a scale may differ and still count as rounded otherwise


@dataclass(frozen=True)
class Verdict:
    """wrong outputs of total. ties: codes beside a tie and scales in their last place that this chip rounds otherwise:
    they are counted apart from wrong ones. error: why the kernel did not run, "" if it did.
    """

    total: int
    wrong: int = 0
    ties: int = 0
    error: str = ""

    @property
    def sound(self) -> bool:
        """May be used: it ran, and nothing but ties differs."""
        return not self.error and not self.wrong

    @property
    def exact(self) -> bool:
        """Every output equals the reference's."""
        return self.sound and not self.ties

    @property
    def text(self) -> str:
        """For a reader."""
        if self.error:
            return f"it fails: {self.error}"
        if self.wrong:
            return f"{self.wrong} of {self.total} outputs are wrong"
        return f"exact but for {self.ties} ties of {self.total}" if self.ties else "exact"

    def __add__(self, other: Verdict) -> Verdict:
        return Verdict(
            self.total + other.total, self.wrong + other.wrong, self.ties + other.ties, self.error or other.error
        )


def guarded(check: Callable[[], Verdict]) -> Verdict:
    """The check's verdict; a kernel that does not compile or run is a verdict too."""
    try:
        return check()
    except FAILURES as error:
        return Verdict(0, error=first_line(error))


def first_line(error: Exception) -> str:
    """A compiler's error without its pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower()]
    return f"{type(error).__name__}: {(telling or lines or ['no message'])[0][:300]}"


def product(
    candidate: Candidate,
    data: problem.ProductData,
    dtype: str,
    runner: Runner,
    extras: Sequence[tuple[bool, bool]] = EXTRAS,
) -> Verdict:
    """A product's kernel on `data`, once for each (bias, residual) of extras."""
    rows = mx.array(prepare(data.q, data.s, candidate.layout))
    words, scale, bias = mx.array(data.weight.words), mx.array(data.weight.scale), mx.array(data.bias)
    residual = mx.array(data.residual).astype(DTYPES[dtype])

    def check() -> Verdict:
        found = Verdict(0)
        for biased, added in extras:
            y = candidate.run(
                runner, rows, words, scale, bias if biased else None, residual if added else None, dtype=dtype
            )
            values = np.array(y.astype(mx.float32))[:, data.columns]
            found += compared(values, data.expected(dtype, biased, added))
        return found

    return guarded(check)


def compared(found: np.ndarray, expected: np.ndarray) -> Verdict:
    """Equal values, element for element; an output of another shape is wrong altogether."""
    if found.shape != expected.shape:
        return Verdict(expected.size, expected.size)
    return Verdict(expected.size, int((found != expected).sum()))


def quantiser(
    make: Callable[[Any, Any], Launch],
    x: np.ndarray,
    layout: Layout,
    dtype: str,
    runner: Runner,
    norm: float | None,
    act: str,
) -> Verdict:
    """A quantise kernel on x: float32 [M, K], or [M, 2K] with an activation function, values of dtype.

    make(x, weight or None) is its launch. norm: eps of an RMSNorm in front, or None. act: "", "relu2" or "silu".
    """
    k = x.shape[1] // (2 if act else 1)
    weight = np.random.default_rng(k).uniform(0.5, 2, k).astype(np.float32) if norm is not None else None
    v = numpy_ref.gated(x[:, :k], x[:, k:], act) if act else x
    q, s = quantize_activations(v) if weight is None else numpy_ref.norm_quantize(v, weight, norm or 0.0)
    p = v if weight is None else v * weight

    def check() -> Verdict:
        outputs = runner(make(mx.array(x).astype(DTYPES[dtype]), None if weight is None else mx.array(weight)))
        return _codes_compared(np.array(outputs[0]), q, s, p, layout)

    return guarded(check)


def _codes_compared(rows: np.ndarray, q: np.ndarray, s: np.ndarray, p: np.ndarray, layout: Layout) -> Verdict:
    m, k = q.shape
    total = m * (layout.width(k) + layout.biases + 1)
    if rows.dtype != np.uint32 or rows.shape != (m, layout.stride(k)):
        return Verdict(total, total)
    xq, _, found = parts(rows, layout, k)
    codes = codes_of(xq.astype(np.float32), layout, k)
    other = codes != q
    # A code that a rounding moved is off by one, and what was rounded lies beside a half.
    top = np.abs(p).max(axis=1, keepdims=True)
    exact = p.astype(np.float64) * 127 / np.where(top > 0, top, 1)
    beside = np.abs(np.abs(exact - np.floor(exact)) - 0.5) < _NEAR_TIE
    flips = other & (np.abs(codes - q) == 1) & beside
    ulps = np.abs(found.view(np.int32).astype(np.int64) - s.view(np.int32))
    rounded = (ulps > 0) & (ulps <= _ULPS)
    own = prepare(codes.astype(np.int8), found, layout)  # what the kernel's own codes and scale ask for beside them
    wrong = int((other & ~flips).sum() + (ulps > _ULPS).sum() + (own != rows).sum())
    return Verdict(total, wrong, int(flips.sum() + rounded.sum()))


def codes_of(xq: Any, layout: Layout, k: int) -> Any:
    """Codes in a layout's order, [M, width] -> in their own, [M, K], in the dtype given. numpy or MLX arrays."""
    m = xq.shape[0]
    if layout.kind == "bytes":
        xq = xq.reshape(m, -1, 4, 4).swapaxes(2, 3)
    elif layout.kind == "trits":
        xq = xq.reshape(m, -1, 2, 5, 2).transpose(0, 1, 4, 2, 3)
    elif layout.kind == "halves":
        one_by = np.array([[1 / scale] for scale in HALF_SCALE], np.float32)
        one_by = mx.array(one_by) if isinstance(xq, mx.array) else one_by
        xq = (xq.reshape(m, -1, 8, 2) * one_by).swapaxes(2, 3)
    return xq.reshape(m, -1)[:, :k]


def rope(
    make: Callable[[Any, Any, Any], Launch], heads: int, kv_heads: int, dim: int, dtype: str, runner: Runner
) -> Verdict:
    """A rotary embedding kernel on two sequences of three positions. make(qkv, cos, sin) is its launch."""
    rng = np.random.default_rng((heads, dim))
    b, length, width = 2, 3, heads + 2 * kv_heads
    qkv = problem.rounded(rng.standard_normal((b, length, width, dim)).astype(np.float32), dtype)
    angle = rng.uniform(0, 6.28, (1, length, dim // 2))
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    turned = np.stack([numpy_ref.rope(x, cos[0], sin[0]) for x in qkv[:, :, : heads + kv_heads]])
    turned = problem.rounded(turned, dtype).swapaxes(1, 2)
    values = qkv[:, :, heads + kv_heads :].swapaxes(1, 2)

    def check() -> Verdict:
        flat = mx.array(qkv.reshape(b, length, -1)).astype(DTYPES[dtype])
        outputs = runner(make(flat, mx.array(cos), mx.array(sin)))
        q, kv = (np.array(a.astype(mx.float32)) for a in outputs)
        return compared(q, turned[:, :heads]) + compared(kv, np.stack([turned[:, heads:], values]))

    return guarded(check)


def floats(
    make: Callable[..., Launch],
    data: problem.ProductData,
    dtype: str,
    runner: Runner,
    extras: Sequence[tuple[bool, bool]] = EXTRAS,
) -> Verdict:
    """A kernel for activations that stay in floating point, on whole numbers, whose sums no order of summation rounds.

    make(x, w, scale, bias, residual) is its launch. With groups along K the reference adds acc_g * scale_g, ascending.
    """
    whole = problem.ProductData(
        data.q, np.ones_like(data.s), data.weight, data.bias, data.residual, data.columns, data.acc
    )

    def check() -> Verdict:
        found = Verdict(0)
        x = mx.array(data.q.astype(np.float32)).astype(DTYPES[dtype])
        words, scale, bias = mx.array(data.weight.words), mx.array(data.weight.scale), mx.array(data.bias)
        residual = mx.array(data.residual).astype(DTYPES[dtype])
        for biased, added in extras:
            launch = make(x, words, scale, bias if biased else None, residual if added else None)
            values = np.array(runner(launch)[0].astype(mx.float32))[:, data.columns]
            found += compared(values, whole.expected(dtype, biased, added))
        return found

    return guarded(check)
