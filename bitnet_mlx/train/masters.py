"""A float model made trainable as a ternary one: its linears become masters that the forward pass ternarises.

The graph around them is the decoder's own (models/decoder_mlx.py), so every family that runs can be trained. With blend b,
a linear multiplies (1 - b) x + b q(x) with (1 - b) w + b t(w): 0 is the float model, 1 the ternary one. How gradients pass
through the quantisers, whatever b is: train/ste.py. Embedding, head and biases stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from bitnet_mlx.errors import ConfigError
from bitnet_mlx.formats.dense import DenseRows
from bitnet_mlx.models.decoder_mlx import MlxModel
from bitnet_mlx.models.weights import DecoderWeights
from bitnet_mlx.nn.dense import DenseLinear
from bitnet_mlx.nn.norm import RMSNorm
from bitnet_mlx.nn.site import Prepared
from bitnet_mlx.train.blend import Blend, ends
from bitnet_mlx.train.optimizer import Tensors
from bitnet_mlx.train.ste import STANDARD, STE, absmean, quantize_input, quantize_weight
from bitnet_mlx.train.sub_norms import SubNorm, insert


class MasterLinear(Prepared):
    """weight: float32 [N, K], the master. bias: float32 [N], if any. log_scale: float32 [], if the scale is learnable.

    blend: see train/blend.py.
    """

    def __init__(self, linear: DenseLinear, ste: STE = STANDARD) -> None:
        super().__init__()
        self.weight = linear.weight.astype(mx.float32)
        if "bias" in linear:
            self.bias = linear.bias
        if ste.learnable:
            self.log_scale = mx.log(absmean(self.weight))
        self.ste = ste
        self.blend: Blend = 0.0
        mx.eval(self.parameters())

    def _at(self) -> mx.array | None:
        """The blend where it lies between the ends, or may."""
        return None if ends(self.blend) == 1 else mx.array(self.blend)

    def prepare(self, x: mx.array) -> mx.array:
        """x [..., K], quantised as far as the blend says, in its dtype."""
        return x if ends(self.blend) == 0 else quantize_input(x, self._at())

    def product(self, ready: mx.array) -> mx.array:
        """What `prepare` gives, [..., K] -> [..., N] in its dtype; the product runs in it."""
        if ends(self.blend) == 0:
            w = self.weight.astype(ready.dtype)
        else:
            w = quantize_weight(self.weight, self.ste, ready.dtype, self.get("log_scale"), self._at())
        y = ready @ w.T
        return (y + self["bias"]).astype(ready.dtype) if "bias" in self else y


def make_student(
    weights: DecoderWeights, dtype: str | None = None, ste: STE = STANDARD, sub_norms: bool = False
) -> MlxModel:
    """A model over float weights whose linears are masters. Raises ConfigError where a linear is not a float one.

    sub_norms: those of the model are new (train/sub_norms.py) and grow in with the blend.
    """
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
                setattr(layer[owner], leaf, MasterLinear(module, ste))
    head = model.lm_head if "lm_head" in model else model.model.embed_tokens
    if isinstance(head, DenseLinear):  # rows of another dtype than the activations' are multiplied in float32
        head.weight = head.weight.astype(getattr(mx, model.dtype))
        mx.eval(head.weight)
    if sub_norms:
        insert(model)
    return model


def trained(model: MlxModel) -> Tensors:
    """What is trained, by Hugging Face name: the masters, their learnable scales and the norms, float32."""
    kinds = {name: module for name, module in model.named_modules() if isinstance(module, (MasterLinear, RMSNorm))}
    flat: Any = tree_flatten(model.parameters())
    parts = ((name.rpartition("."), array) for name, array in flat)
    return {f"{at}.{leaf}": array for (at, _, leaf), array in parts if at in kinds and leaf in ("weight", "log_scale")}


def set_blend(layers: Sequence[nn.Module], blends: Sequence[Blend]) -> None:
    """One blend a layer of a student."""
    for layer, blend in zip(layers, blends, strict=True):
        for _, module in layer.named_modules():
            if isinstance(module, MasterLinear | SubNorm):
                module.blend = blend
