"""Quantisers whose gradient passes through rounding: ternary weights, and int8 activations.

Forward: w -> t m with t = clip(rint(w / m), -1, 1), and x -> q / s (formulas in bitnet_mlx/ternary.py). A blend b gives
(1 - b) w + b t m, which is w at 0 and t m at 1 to the last bit. Backward, the slope of another function stands for that of
rounding; with u = w / m and m a constant (but for the last):

    standard    1, the identity's (Bengio et al., 2013)
    clipped     1 where |u| <= clip, else 0
    soft        that of (tanh(k (u - 1/2)) + tanh(k (u + 1/2))) / 2, a smooth staircase; k is the sharpness
    learnable   as clipped, and m is a parameter of its own, with LSQ's gradient (Esser et al., 2020): the sum of t - u where
                |u| <= clip and of t elsewhere, over the root of the count of weights. What is trained is log m, so that m
                stays above 0 and a step of the optimiser changes it by a share of itself.

Activations take the identity's slope in all of them: none of them lies beyond the codes. On a GPU the elementwise part of
each quantiser is one compiled kernel, which also casts to the dtype that products run in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, cast, get_args

import mlx.core as mx

from bitnet_mlx.errors import ConfigError
from bitnet_mlx.ternary import MIN_SCALE
from bitnet_mlx.train.blend import mixed
from bitnet_mlx.train.scalars import alone

Kind = Literal["standard", "clipped", "soft", "learnable"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_MIN = float(MIN_SCALE)


@dataclass(frozen=True)
class STE:
    """A straight-through estimator of ternary weights. clip and sharpness: see above."""

    kind: Kind = "standard"
    clip: float = 1.5
    sharpness: float = 2.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"[ste] --ste is {self.kind!r}; {', '.join(KINDS)} are allowed")
        for name, value in (("clip", self.clip), ("sharpness", self.sharpness)):
            if not 0 < value < float("inf"):
                raise ConfigError(f"[ste] --ste-{name} is {value}; give a number above 0")

    @property
    def learnable(self) -> bool:
        """Whether each weight has a parameter for its scale."""
        return self.kind == "learnable"


STANDARD = STE()


def absmean(w: mx.array) -> mx.array:
    """The scale of a float32 weight of any shape, float32 []."""
    return mx.maximum(alone(mx.mean(mx.abs(w))), _MIN)


def codes(w: mx.array, m: mx.array) -> mx.array:
    """t, float32 of the shape of w, in -1, 0, 1."""
    return mx.clip(mx.round(w * (1.0 / m)), -1, 1)


def ternary_parts(w: mx.array) -> tuple[mx.array, mx.array]:
    """float32 weight of any shape -> (t float32 of the same shape in -1, 0, 1; m float32 [])."""
    m = absmean(w)
    return codes(w, m), m


def activation_parts(x: mx.array) -> tuple[mx.array, mx.array]:
    """x [..., K] -> (q float32 [..., K] of integers, s float32 [..., 1]); half to even, in float32 whatever x is."""
    # max and -min read x twice; max of |x| would write and read a third copy.
    low = alone(-mx.min(x, axis=-1, keepdims=True))
    top = alone(mx.maximum(mx.max(x, axis=-1, keepdims=True), low)).astype(mx.float32)
    s = 127.0 / mx.maximum(top, _MIN)
    return mx.clip(mx.round(x.astype(mx.float32) * s), -128, 127), s


def quantize_input(x: mx.array, blend: mx.array | None = None) -> mx.array:
    """x [..., K] -> q / s, or its blend with x (blend: float32 []), in x's dtype. The gradient passes unchanged."""
    return cast(mx.array, _input_function()(x) if blend is None else _input_function()(x, blend))


def quantize_weight(
    w: mx.array,
    ste: STE = STANDARD,
    dtype: mx.Dtype = mx.float32,
    log_scale: mx.array | None = None,
    blend: mx.array | None = None,
) -> mx.array:
    """Float32 W of any shape -> t m, or its blend with W, in `dtype`.

    log_scale: float32 [], the logarithm of m; None takes m = absmean(W). blend: float32 []. The gradients with respect to W
    and log_scale are those of `ste`.
    """
    m = mx.stop_gradient(absmean(w)) if log_scale is None else mx.exp(log_scale)
    function = _weight_function(ste, dtype)
    return cast(mx.array, function(w, m) if blend is None else function(w, m, blend))


def _fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """One kernel on a GPU. On the CPU MLX would call a C++ compiler, which may be missing."""
    compiled = mx.compile(function)
    return lambda *arrays: (compiled if mx.default_device() == mx.gpu else function)(*arrays)


@cache
def _input_function() -> Callable[..., mx.array]:
    def values(x: mx.array, *blend: mx.array) -> mx.array:
        q, s = activation_parts(x)
        return _blended(x.astype(mx.float32), q / s, *blend).astype(x.dtype)

    function: Any = mx.custom_function(_fused(values))

    @function.vjp
    def vjp(primals: Any, cotangent: mx.array, _output: mx.array) -> Any:
        return (cotangent, mx.zeros_like(primals[1])) if isinstance(primals, tuple) else cotangent

    return function


@cache
def _weight_function(ste: STE, dtype: mx.Dtype) -> Callable[..., mx.array]:
    def values(w: mx.array, m: mx.array, *blend: mx.array) -> mx.array:
        return _blended(w, codes(w, m) * m, *blend).astype(dtype)

    def to_weight(g: mx.array, w: mx.array, m: mx.array, *blend: mx.array) -> mx.array:
        g = g.astype(mx.float32)
        return g * _blended(mx.array(1.0), _slope(ste, w * (1.0 / m)), *blend)

    def to_scale(g: mx.array, w: mx.array, m: mx.array, *blend: mx.array) -> mx.array:
        u = w * (1.0 / m)
        each = mx.clip(mx.round(u), -1, 1) - mx.where(mx.abs(u) <= ste.clip, u, 0)
        return g.astype(mx.float32) * _blended(mx.array(0.0), each, *blend)

    function: Any = mx.custom_function(_fused(values))
    weight_part, scale_part = _fused(to_weight), _fused(to_scale)

    @function.vjp
    def vjp(primals: tuple[mx.array, ...], cotangent: mx.array, _output: mx.array) -> tuple[mx.array, ...]:
        plain = ste.kind == "standard"
        dw = cotangent.astype(mx.float32) if plain else weight_part(cotangent, *primals)
        dm = mx.zeros_like(primals[1])
        if ste.learnable:
            dm = scale_part(cotangent, *primals).sum() * primals[0].size ** -0.5
        return (dw, dm, *(mx.zeros_like(blend) for blend in primals[2:]))

    return function


def _blended(plain: mx.array, quantised: mx.array, *blend: mx.array) -> mx.array:
    """Their blend; without one, quantised."""
    return mixed(plain, quantised, blend[0]) if blend else quantised


def _slope(ste: STE, u: mx.array) -> mx.array:
    """What stands for the slope of rounding at u."""
    if ste.kind == "soft":
        low, high = mx.tanh(ste.sharpness * (u - 0.5)), mx.tanh(ste.sharpness * (u + 0.5))
        return (0.5 * ste.sharpness) * (2 - low * low - high * high)
    return (mx.abs(u) <= ste.clip).astype(mx.float32)
