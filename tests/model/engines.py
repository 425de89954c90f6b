"""The engines that tests of whole models run over, each with `observe` where its codes can be seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from bitnet_mlx.backends.mlx_affine import Codes, StockOps
from bitnet_mlx.models.config import DecoderConfig
from bitnet_mlx.models.decoder_cpu import CpuDecoder
from bitnet_mlx.models.decoder_mlx import MlxModel
from bitnet_mlx.models.decoder_numpy import NumpyDecoder
from bitnet_mlx.models.weights import DecoderWeights
from bitnet_mlx.nn.site import PackedSite
from bitnet_mlx.ternary import TernaryTensor

EXACT = ("numpy", "cpu")  # equal to each other to the last bit
ENGINES = (*EXACT, "mlx")
SHARED = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))
Observer = Callable[[str, np.ndarray], None]


def observed_names(weights: DecoderWeights) -> list[str]:
    """The quantised linears, of several that share an input the first alone."""

    def quantised(name: str) -> bool:
        weight = weights.linears[name].weight
        return isinstance(weight, TernaryTensor) and weight.activation_bits == 8

    def repeated(name: str) -> bool:
        if weights.linears[name].norm is not None:
            return False
        prefix, block, leaf = name.rsplit(".", 2)
        inner = f"{block}.{leaf}"
        earlier = next((group[: group.index(inner)] for group in SHARED if inner in group), ())
        shared = [name for name in (f"{prefix}.{other}" for other in earlier) if weights.linears[name].norm is None]
        return any(quantised(name) for name in shared)

    return [name for name in weights.linears if quantised(name) and not repeated(name)]


class ObservedOps(StockOps):
    """Stock MLX operations that show the codes of each product to an observer. names: by the id of a layer's words."""

    def __init__(self) -> None:
        self.observe: Observer | None = None
        self.names: dict[int, str] = {}

    def linear(self, codes: Codes, words: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        if self.observe is not None and id(words) in self.names:
            self.observe(self.names[id(words)], np.array(codes.q, np.int8).reshape(-1, codes.q.shape[-1]))
        return super().linear(codes, words, *args, **kwargs)


class ObservedMlx:
    """The MLX decoder in float32, with NumpyDecoder's `observe`."""

    name = "mlx"

    def __init__(self, weights: DecoderWeights) -> None:
        self.ops = ObservedOps()
        self.model = MlxModel.from_weights(weights, "float32", self.ops)
        self.config: DecoderConfig = weights.config
        self.make_cache, self.step = self.model.make_cache, self.model.step
        wanted = set(observed_names(weights))
        layers = dict(self.model.named_modules())
        self.ops.names = {id(layers[name].weight): name for name in wanted}
        for number, block in enumerate(self.model.layers):
            for site, first in zip(block.sites(), ("self_attn.q_proj", None, "mlp.gate_proj", None), strict=True):
                site = getattr(site, "inner", site)  # behind the norms of heads
                if first and isinstance(site, PackedSite):  # one product, of which the first layer's weight is a part
                    self.ops.names[id(site.arrays.packed[0])] = f"model.layers.{number}.{first}"

    @property
    def observe(self) -> Observer | None:
        return self.ops.observe

    @observe.setter
    def observe(self, observer: Observer | None) -> None:
        self.ops.observe = observer


def build(name: str, weights: DecoderWeights) -> Any:
    """A decoder by its engine's name."""
    return {"numpy": NumpyDecoder, "cpu": CpuDecoder, "mlx": ObservedMlx}[name](weights)
