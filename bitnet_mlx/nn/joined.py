"""Linears that read the same input, as one product where they can be: q, k and v; gate and up."""

from __future__ import annotations

from collections.abc import Sequence

from bitnet_mlx.backends.mlx_import import mx, nn
from bitnet_mlx.nn.bitlinear import BitLinear

Packed = tuple[mx.array, mx.array, "mx.array | None"]  # words, scale and bias of one product


class Joined:
    """One product for several BitLinears on the same x, their outputs side by side.

    Their words lie in one array, in order along N, and each layer's `weight` becomes the view of its own rows: nothing
    is held twice, and the layers stay what they were to all who call them by name. Scales per tensor become scales per
    row, which gives the same bits; scales in groups join only their like. A single layer joins with nobody, and neither
    does one that norms its own input.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        ours = [layer for layer in layers if type(layer) is BitLinear and "norm" not in layer]
        self._packed = _join(ours) if len(ours) == len(layers) and _alike(ours) else None
        self._held = [(layer, dict(layer.parameters())) for layer in layers]

    def packed(self, layers: Sequence[nn.Module]) -> Packed | None:
        """The product's arrays while `layers` are still those that were joined, with the very arrays; else None.

        A layer that was replaced (an adapter) or given other weights has to be called by itself.
        """
        for layer, (held, arrays) in zip(layers, self._held, strict=True):
            if layer is not held or any(layer.get(name) is not array for name, array in arrays.items()):
                return None
        return self._packed


def _alike(layers: Sequence[BitLinear]) -> bool:
    """Whether one product serves them. A bias of 0 for those that have none would turn an output of -0 into 0."""
    kinds = {(x.input_dims, x.activation_bits, x.scale.ndim == 2, "bias" in x, id(x.ops)) for x in layers}
    return len(kinds) == 1


def _join(layers: Sequence[BitLinear]) -> Packed:
    first = layers[0]
    if len(layers) == 1:
        return first.weight, first.scale, first.get("bias")
    # N is the last axis but one in both arrangements, [N, W] and [G, N, 8].
    words = mx.concatenate([x.weight for x in layers], axis=-2)
    rows = [x.scale if x.scale.ndim else mx.broadcast_to(x.scale, (x.output_dims,)) for x in layers]
    scale = mx.concatenate(rows, axis=0)
    bias = mx.concatenate([x.bias for x in layers]) if "bias" in first else None
    mx.eval(words, scale, *([] if bias is None else [bias]))
    start = 0
    for layer in layers:
        layer.weight = words[..., start : start + layer.output_dims, :]
        start += layer.output_dims
    mx.eval([layer.weight for layer in layers])
    return words, scale, bias
