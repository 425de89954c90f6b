"""BitLinear: a linear layer over packed ternary weights, as an mlx.nn.Module."""

from __future__ import annotations

import numpy as np

from bitnet_mlx.backends.mlx_affine import Codes, StockOps
from bitnet_mlx.backends.mlx_import import mx, nn
from bitnet_mlx.backends.resident_mlx import from_numpy
from bitnet_mlx.errors import ConfigError
from bitnet_mlx.formats import words2
from bitnet_mlx.nn.gradient import straight_through
from bitnet_mlx.nn.watched import Watched
from bitnet_mlx.ternary import TernaryTensor, ternarize


class BitLinear(Watched):
    """y = x W^T (+ bias), W ternary [N, K]; inputs are quantised to int8 for each token unless activation_bits is 16.

    weight: uint32 code words as `ops` arranges them. scale: float32 [], [N] or [N, G]. bias: float32 [N], if any.
    norm: an RMSNorm of the layer's own on x, if any; it is set after the layer is made.
    All stay frozen: packed weights cannot be trained; gradients flow to x, as if it were not quantised. `ops` computes;
    StockOps is stock MLX, on any device.
    """

    def __init__(self, tensor: TernaryTensor, bias: np.ndarray | None = None, ops: StockOps | None = None) -> None:
        super().__init__()
        self.ops = ops or StockOps()
        self.output_dims, self.input_dims = tensor.shape
        self.activation_bits = tensor.activation_bits
        self.scale = from_numpy(tensor.scale)
        self.weight = self.ops.arrange(from_numpy(tensor.words), self.scale)
        if bias is not None:
            self.bias = _bias(bias, self.output_dims)
        mx.eval(self.parameters())  # a lazy array could only be computed by the thread that made it

    @classmethod
    def from_tensor(
        cls, tensor: TernaryTensor, bias: np.ndarray | None = None, ops: StockOps | None = None
    ) -> BitLinear:
        """A layer over `tensor`, with a float32 bias [N] where given."""
        return cls(tensor, bias, ops)

    @classmethod
    def from_linear(cls, linear: nn.Linear, activation_bits: int = 8, ops: StockOps | None = None) -> BitLinear:
        """Ternarise a float layer by the mean of |W| over the whole tensor (BitNet b1.58): this changes its outputs.

        Raises FormatError if a weight is not finite.
        """
        t, m = ternarize(np.array(linear.weight.astype(mx.float32)))
        tensor = TernaryTensor(words2.pack(t), np.asarray(m, np.float32), t.shape, activation_bits)
        bias = np.array(linear.bias.astype(mx.float32)) if "bias" in linear else None
        return cls(tensor, bias, ops)

    def to_tensor(self) -> TernaryTensor:
        """The weight as it was given to from_tensor, bit for bit."""
        words = np.array(self.ops.restore(self.weight))
        return TernaryTensor(words, np.array(self.scale), (self.output_dims, self.input_dims), self.activation_bits)

    def __call__(self, x: mx.array | Codes) -> mx.array:
        """x: [..., K] of any float dtype, or the Codes of the normed x. Returns [..., N] in the dtype of x."""
        width = x.columns if isinstance(x, Codes) else x.shape[-1]
        if width != self.input_dims:
            raise ConfigError(f"[BitLinear] the input has {width} columns; the layer takes {self.input_dims}")
        bias = self.bias if "bias" in self else None
        if isinstance(x, Codes):
            return self.ops.linear(x, self.weight, self.scale, bias)
        norm = self.get("norm")
        x = x if norm is None else norm(x)
        return straight_through(self.ops, self.activation_bits, x, self.weight, self.scale, bias)

    def rows(self, index: mx.array) -> mx.array:
        """The chosen rows of W, scaled: float32 [*index.shape, K]."""
        return self.ops.rows(self.weight, self.scale, index, self.input_dims)

    @property
    def _no_grad(self) -> set[str]:
        """The frozen names, which nn.Module keeps here: always the same, whatever a model around it unfreezes."""
        return {"weight", "scale", "bias"}

    @_no_grad.setter
    def _no_grad(self, names: set[str]) -> None:
        """nn.Module starts with an empty set."""

    def _extra_repr(self) -> str:
        scales = {0: "tensor", 1: "row", 2: "group of 128"}[self.scale.ndim]
        return (
            f"input_dims={self.input_dims}, output_dims={self.output_dims}, bias={'bias' in self}, "
            f"scale per {scales}, activation_bits={self.activation_bits}, ops={self.ops.name}"
        )


def _bias(bias: np.ndarray, n: int) -> mx.array:
    if bias.shape != (n,):
        raise ConfigError(f"[BitLinear] the bias has shape {bias.shape}; a layer of {n} outputs takes ({n},)")
    return from_numpy(np.asarray(bias, np.float32))
