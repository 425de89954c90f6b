"""A place in a layer where one input goes through one or several linears: normed, quantised, multiplied, added.

`PackedSite` does it by the fused operations, `ModuleSite` module by module; both give the same bits. Which of the two
stands at a place is decided for each step, since a layer may have been replaced or its weights changed meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from bitnet_mlx.backends.kernels.layout import Layout
from bitnet_mlx.backends.mlx_affine import Codes, StockOps, gated
from bitnet_mlx.backends.mlx_import import mx, nn
from bitnet_mlx.nn.bitlinear import BitLinear
from bitnet_mlx.nn.joined import Joined, Packed
from bitnet_mlx.nn.norm import RMSNorm, rms_norm
from bitnet_mlx.nn.watched import Watched


class Spy(NamedTuple):
    """Looks into a place: `tell` is called with a layer's number there, its float32 input and its output; `clip` gives the
    largest |x| that its quantiser takes, or None."""

    tell: Callable[[int, mx.array, mx.array], None]
    clip: Callable[[int], float | None]


class Prepared(Watched):
    """A linear whose input is made ready first, in the same way for all linears of a place: once for all of them."""

    def prepare(self, x: mx.array) -> mx.array:
        """x [..., K] -> what `product` takes."""
        raise NotImplementedError

    def product(self, ready: mx.array) -> mx.array:
        """[..., K] -> [..., N]."""
        raise NotImplementedError

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., K] -> [..., N]."""
        return self.product(self.prepare(x))


class Arrays(NamedTuple):
    """A packed site's arrays: its product, and the weight float32 [K] of the norm before it, if there is one."""

    packed: Packed
    norm: mx.array | None


class Static(NamedTuple):
    """A packed site's numbers: bits of activations (8 or 16), K, and the eps of the norm before it."""

    bits: int
    k: int
    eps: float


class PackedSite:
    """One packed product."""

    def __init__(self, ops: StockOps, static: Static, arrays: Arrays) -> None:
        self.ops = ops
        self.static, self.arrays = Static(*static), Arrays(*arrays)  # a compiled function is given plain tuples

    def __call__(self, x: mx.array, residual: mx.array | None = None) -> mx.array:
        """x [B, L, K] -> [B, L, N] in the dtype of x, plus the residual."""
        (words, scale, bias), norm = self.arrays
        bits, _, eps = self.static
        if bits == 16:
            return self._float(x if norm is None else rms_norm(x, norm, eps), residual)
        return self.ops.fused_linear(x, words, scale, bias, residual, norm=norm, eps=eps)

    def gated(self, gate_up: mx.array, act: str, residual: mx.array) -> mx.array:
        """The same of act(gate) * up. gate_up: [B, L, 2 K], gate first."""
        (words, scale, bias), norm = self.arrays
        bits, _, eps = self.static
        if bits == 16:
            hidden = gated(gate_up, act)
            hidden = hidden if norm is None else rms_norm(hidden, norm, eps)
            return self._float(hidden.astype(gate_up.dtype), residual)
        return self.ops.fused_linear(gate_up, words, scale, bias, residual, norm=norm, eps=eps, act=act)

    def _float(self, x: mx.array, residual: mx.array | None) -> mx.array:
        words, scale, bias = self.arrays.packed
        return self.ops.float_linear(x, words, scale, bias, residual)


class ModuleSite:
    """The same, one module at a time, whatever the modules are; in training with gradients at every step."""

    def __init__(
        self, layers: Sequence[nn.Module], norm: nn.Module | None, training: bool, spy: Spy | None = None
    ) -> None:
        self.layers, self.norm, self.training, self.spy = layers, norm, training, spy

    def __call__(self, x: mx.array, residual: mx.array | None = None) -> mx.array:
        """x [B, L, K] -> [B, L, N], the layers' outputs side by side, plus the residual."""
        return self._run(x, x.dtype, residual)

    def gated(self, gate_up: mx.array, act: str, residual: mx.array) -> mx.array:
        """The same of act(gate) * up. gate_up: [B, L, 2 K], gate first."""
        return self._run(gated(gate_up, act, self.training), gate_up.dtype, residual)

    def _run(self, x: mx.array, dtype: mx.Dtype, residual: mx.array | None) -> mx.array:
        outputs = self._outputs(x, dtype)
        y = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=-1)
        return y if residual is None else residual + y

    def _outputs(self, x: mx.array, dtype: mx.Dtype) -> list[mx.array]:
        outputs = self._products(x, dtype)
        if self.spy is None:
            return outputs
        wide = x.astype(mx.float32)
        plain = wide if self.norm is None else self.norm(wide)
        for i, layer in enumerate(self.layers):
            own = layer.get("norm")
            seen = plain if own is None else own(plain)
            clip = self.spy.clip(i)
            if clip is not None and isinstance(layer, BitLinear) and layer.activation_bits == 8:
                codes = layer.ops.quantize(mx.clip(seen, -clip, clip), _layout(layer, x))
                outputs[i] = layer(codes._replace(dtype=dtype))
            self.spy.tell(i, seen, outputs[i])
        return outputs

    def _products(self, x: mx.array, dtype: mx.Dtype) -> list[mx.array]:
        """x may be wider than `dtype`, the model's, which the outputs have. It is quantised once for a form of codes."""
        codes: dict[Layout | None, Codes] = {}
        plain = ready = None
        outputs = []
        for layer in self.layers:
            if isinstance(layer, BitLinear) and layer.activation_bits == 8 and not self.training:
                to = _layout(layer, x)
                own = layer.get("norm")
                if own is not None:
                    plain = self._plain(x, dtype) if plain is None else plain
                    outputs.append(layer(own.quantize(plain, to)))
                    continue
                if to not in codes:
                    codes[to] = self._codes(x, layer.ops, to)._replace(dtype=dtype)
                outputs.append(layer(codes[to]))
            else:
                plain = self._plain(x, dtype) if plain is None else plain
                if isinstance(layer, Prepared):
                    ready = layer.prepare(plain) if ready is None else ready
                    outputs.append(layer.product(ready))
                else:
                    outputs.append(layer(plain))
        return outputs

    def _plain(self, x: mx.array, dtype: mx.Dtype) -> mx.array:
        return (x if self.norm is None else self.norm(x)).astype(dtype)

    def _codes(self, x: mx.array, ops: StockOps, to: Layout | None) -> Codes:
        if isinstance(self.norm, RMSNorm):
            return self.norm.quantize(x, to)
        return ops.quantize(x if self.norm is None else self.norm(x), to)


def _layout(layer: BitLinear, x: mx.array) -> Layout | None:
    """The form of codes that a layer wants for the rows of x [B, L, K]."""
    return layer.ops.target(layer.weight, layer.scale, x.shape[0] * x.shape[1], layer.input_dims)


def site(
    joined: Joined, layers: Sequence[nn.Module], norm: nn.Module | None, training: bool, spy: Spy | None = None
) -> PackedSite | ModuleSite:
    """What stands at a place now. joined: made of the layers that the model was built with. With a spy it is modules."""
    packed, first = None if training or spy else joined.packed(layers), layers[0]
    if packed is None or not isinstance(first, BitLinear) or type(norm) not in (RMSNorm, type(None)):
        return ModuleSite(layers, norm, training, spy)
    weight, eps = (norm.weight, norm.eps) if isinstance(norm, RMSNorm) else (None, 0.0)
    return PackedSite(first.ops, Static(first.activation_bits, first.input_dims, eps), Arrays(packed, weight))
