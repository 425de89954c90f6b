"""A float model made trainable as a ternary one: its linears become masters that the forward pass ternarises.

The graph around them is the decoder's own (models/decoder_mlx.py), so every family that runs can be trained. With blend b,
a linear multiplies x + b (q(x) - x) with w + b (t(w) - w): 0 is the float model, 1 the ternary one. Gradients pass straight
through both quantisers (train/layers.py), whatever b is. Embedding, head and biases stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from bitnet_mlx.errors import ConfigError
from bitnet_mlx.formats.dense import DenseRows
from bitnet_mlx.models.decoder_mlx import MlxModel
from bitnet_mlx.models.weights import DecoderWeights
from bitnet_mlx.nn.dense import DenseLinear
from bitnet_mlx.nn.norm import RMSNorm
from bitnet_mlx.nn.watched import Watched
from bitnet_mlx.train.layers import quantize_input, quantize_weight
from bitnet_mlx.train.optimizer import Tensors


class MasterLinear(Watched):
    """weight: float32 [N, K], the master. bias: float32 [N], if any. blend: a number in 0 to 1."""

    def __init__(self, linear: DenseLinear) -> None:
        super().__init__()
        self.weight = linear.weight.astype(mx.float32)
        if "bias" in linear:
            self.bias = linear.bias
        self.blend = 0.0
        mx.eval(self.weight)

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., K] -> [..., N] in the dtype of x; the product runs in it."""
        w, b = self.weight, self.blend
        if b >= 1:
            x, w = quantize_input(x), quantize_weight(w)
        elif b > 0:
            x, w = x + b * (quantize_input(x) - x), w + b * (quantize_weight(w) - w)
        y = x @ w.astype(x.dtype).T
        return (y + self["bias"]).astype(x.dtype) if "bias" in self else y


def make_student(weights: DecoderWeights, dtype: str | None = None) -> MlxModel:
    """A model over float weights whose linears are masters. Raises ConfigError where a linear is not a float one."""
    for name, linear in weights.linears.items():
        if not isinstance(linear.weight, DenseRows) or linear.norm is not None:
            raise ConfigError(
                f"[qat] {name} is ternary or quantised already, or has a norm of its own; give a model of float weights"
            )
    model = MlxModel(weights, dtype)
    for layer in model.layers:
        for name, module in layer.named_modules():
            if isinstance(module, DenseLinear):
                owner, _, leaf = name.rpartition(".")
                setattr(layer[owner], leaf, MasterLinear(module))
    return model


def trained(model: MlxModel) -> Tensors:
    """What is trained, by Hugging Face name: the masters and the norms, float32."""
    kinds = {name: module for name, module in model.named_modules() if isinstance(module, (MasterLinear, RMSNorm))}
    flat: Any = tree_flatten(model.parameters())
    return {name: array for name, array in flat if name.removesuffix(".weight") in kinds}


def set_blend(model: MlxModel, blends: Sequence[float]) -> None:
    """One number a layer."""
    for layer, blend in zip(model.layers, blends, strict=True):
        for _, module in layer.named_modules():
            if isinstance(module, MasterLinear):
                module.blend = blend
