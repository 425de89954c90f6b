"""Linear layers that are not ternary: float rows, and rows of 8, 6 or 4-bit codes in groups of 64 columns.

Heads, embeddings, and the linears that a checkpoint leaves in floating point. Each gives `layer(x)`, the product with
every row, and `layer.rows(ids)`, the rows themselves, so that tied embeddings are held once.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bitnet_mlx.backends.mlx_affine import StockOps, row_limit
from bitnet_mlx.backends.mlx_import import mx, nn
from bitnet_mlx.backends.resident_mlx import from_numpy
from bitnet_mlx.formats.dense import HEAD_GROUP, DenseRows, GroupedRows
from bitnet_mlx.nn.bitlinear import BitLinear
from bitnet_mlx.ternary import TernaryTensor

Matrix = TernaryTensor | DenseRows | GroupedRows
_ROWS_AT_ONCE = 8192  # rows widened or packed at a time, so that a large head is never held twice


class DenseLinear(nn.Module):
    """weight [N, K] in the checkpoint's dtype; bias float32 [N], if any."""

    def __init__(self, matrix: DenseRows, bias: np.ndarray | None = None) -> None:
        super().__init__()
        weight = from_numpy(matrix.data)
        self.weight = weight.view(mx.bfloat16) if matrix.dtype == "bfloat16" else weight
        _finish(self, bias)

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., K] -> [..., N] in the dtype of x; computed in float32 unless x and weight have the same dtype."""
        x = _normed(self, x)
        if x.dtype == self.weight.dtype:
            y = x @ self.weight.T
        else:
            wide = x.astype(mx.float32)
            starts = range(0, self.weight.shape[0], _ROWS_AT_ONCE)
            parts = [wide @ self.weight[at : at + _ROWS_AT_ONCE].astype(mx.float32).T for at in starts]
            y = mx.concatenate(parts, axis=-1)
        return _biased(self, y).astype(x.dtype)

    def rows(self, index: mx.array) -> mx.array:
        """[*index.shape, K], in the rows' own dtype."""
        return self.weight[index]

    def _extra_repr(self) -> str:
        n, k = self.weight.shape
        return f"input_dims={k}, output_dims={n}, bias={'bias' in self}, dtype={self.weight.dtype}"


class GroupedLinear(nn.Module):
    """Symmetric codes as MLX's affine form: unsigned code c + 2^(bits-1), scale s, bias -2^(bits-1) * s, groups of 64.

    weight: uint32 [N, padded K * bits / 32]; columns are padded with code 0 to a multiple of 64. scales: float32 [N, G].
    bias: float32 [N], if any.
    """

    def __init__(self, matrix: GroupedRows, bias: np.ndarray | None = None) -> None:
        super().__init__()
        self.bits = matrix.bits
        self.input_dims = matrix.shape[1]
        self.weight = from_numpy(pack_affine(matrix.codes, matrix.bits))
        self.scales = from_numpy(matrix.scales)
        self.biases = self.scales * -self._middle
        _finish(self, bias)

    @property
    def _middle(self) -> int:
        return 1 << (self.bits - 1)

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., K] -> [..., N] in the dtype of x, computed in float32."""
        x = _normed(self, x)
        wide = x.astype(mx.float32).reshape(-1, self.input_dims)
        pad = -self.input_dims % HEAD_GROUP
        if pad:
            wide = mx.pad(wide, [(0, 0), (0, pad)])
        limit = row_limit() or max(wide.shape[0], 1)
        parts = [
            mx.quantized_matmul(
                wide[at : at + limit], self.weight, self.scales, self.biases, group_size=HEAD_GROUP, bits=self.bits
            )
            for at in range(0, wide.shape[0], limit)
        ]
        y = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=0)
        return _biased(self, y.reshape(*x.shape[:-1], -1)).astype(x.dtype)

    def rows(self, index: mx.array) -> mx.array:
        """float32 [*index.shape, K], with the bits of GroupedRows.rows: whole numbers first, then one product."""
        scales = self.scales[index]
        ones = mx.ones(scales.shape, mx.float32)
        codes = mx.dequantize(self.weight[index], ones, ones * -self._middle, group_size=HEAD_GROUP, bits=self.bits)
        return (codes * mx.repeat(scales, HEAD_GROUP, axis=-1))[..., : self.input_dims]

    def _extra_repr(self) -> str:
        return (
            f"input_dims={self.input_dims}, output_dims={self.weight.shape[0]}, bias={'bias' in self}, bits={self.bits}"
        )


def pack_affine(codes: np.ndarray, bits: int) -> np.ndarray:
    """int8 [N, K] -> MLX's affine words, uint32 [N, padded K * bits / 32], K padded to a multiple of 64 with code 0.

    A row is one run of bits, low bits first: value k takes bits k * bits to (k + 1) * bits of it.
    """
    n, k = codes.shape
    width = -(-k // HEAD_GROUP) * HEAD_GROUP
    words = np.empty((n, width * bits // 32), "<u4")
    for at in range(0, n, _ROWS_AT_ONCE):
        part = codes[at : at + _ROWS_AT_ONCE]
        unsigned = np.full((len(part), width), 1 << (bits - 1), np.uint8)
        unsigned[:, :k] = part.astype(np.int16) + (1 << (bits - 1))
        if bits != 8:
            single = np.unpackbits(unsigned[..., None], axis=-1, bitorder="little")[..., :bits]
            unsigned = np.packbits(single.reshape(len(part), width * bits), axis=-1, bitorder="little")
        words[at : at + _ROWS_AT_ONCE] = unsigned.view("<u4")
    return words


def linear_layer(
    matrix: Matrix, bias: np.ndarray | None = None, ops: StockOps | None = None
) -> BitLinear | DenseLinear | GroupedLinear:
    """The layer for a matrix of any storage."""
    if isinstance(matrix, TernaryTensor):
        return BitLinear(matrix, bias, ops)
    return DenseLinear(matrix, bias) if isinstance(matrix, DenseRows) else GroupedLinear(matrix, bias)


def head_layer(matrix: Matrix, ops: StockOps | None = None) -> BitLinear | DenseLinear | GroupedLinear:
    """The layer for an embedding or a head, whose inputs are never quantised."""
    if isinstance(matrix, TernaryTensor):
        matrix = replace(matrix, activation_bits=16)
    return linear_layer(matrix, None, ops)


def _finish(layer: nn.Module, bias: np.ndarray | None) -> None:
    if bias is not None:
        layer.bias = from_numpy(np.asarray(bias, np.float32))
    mx.eval(layer.parameters())


def _normed(layer: nn.Module, x: mx.array) -> mx.array:
    """x, or what the layer's own norm makes of it."""
    return layer["norm"](x) if "norm" in layer else x


def _biased(layer: nn.Module, y: mx.array) -> mx.array:
    return y.astype(mx.float32) + layer["bias"] if "bias" in layer else y
