"""The MLX decoder: the way of layers_mlx.py, each part evaluated by itself.

Evaluating in pieces costs more than one graph a token does, above all on a GPU: what evaluating a single number takes is
measured before each pass and taken off each part.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from bitnet_mlx.backends.mlx_affine import Codes, StockOps
from bitnet_mlx.backends.mlx_import import mx
from bitnet_mlx.bench.launches_mlx import launches
from bitnet_mlx.bench.layer_launches_mlx import kernel_launches, stock_launches
from bitnet_mlx.bench.profiled.engine import cache_traffic
from bitnet_mlx.models.layers_mlx import attend, side_by_side
from bitnet_mlx.models.parts import PIECE
from bitnet_mlx.nn.lora import LoRALinear
from bitnet_mlx.nn.norm import RMSNorm
from bitnet_mlx.nn.site import PackedSite
from bitnet_mlx.profile.spans import Recorder
from bitnet_mlx.ternary import SCALES

_TOLLS = 9


class _CutOps:
    """A model's operations; codes are evaluated, and the time until then is marked, before a product reads them."""

    def __init__(self, ops: Any, recorder: Recorder, layer: int) -> None:
        self._ops, self._recorder, self._layer = ops, recorder, layer

    def fused_linear(self, *arguments: Any, **named: Any) -> mx.array:
        """The quantiser and the product apart, whatever kernel the model takes."""
        cut: Any = self
        return StockOps.fused_linear(cut, *arguments, **named)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._ops, name)
        if name not in ("quantize", "norm_quantize", "gated_quantize"):
            return found

        def cut(*arguments: Any, **named: Any) -> Codes:
            codes: Codes = found(*arguments, **named)
            mx.eval([x for x in (codes.q, codes.s) if x is not None])
            self._recorder.mark("norm", self._layer)
            return codes

        return cut


class TimedMlx:
    """Activation functions count to the norm and quantiser that they share a kernel with."""

    launch_kind = "kernel launches on a GPU"

    def __init__(self, decoder: Any) -> None:
        self.model = decoder
        self.recorder = Recorder()
        self._launches: int | None = None

    def step(self, ids: Sequence[int], cache: Any) -> np.ndarray:
        """See Timed."""
        model = self.model
        self.recorder.toll = self._toll()
        self.recorder.resume()
        for entry in cache:
            entry.reserve(len(ids))
        x = mx.zeros((1, 1, 1))
        for start in range(0, len(ids), PIECE):
            piece = mx.array(np.asarray(ids[start : start + PIECE], np.int32))[None]
            x = model.model.embed_tokens.rows(piece).astype(model.model.dtype)
            self._end(x, "embedding", None)
            x = self._layers(x, cache)
        logits = model.head(x[:, -1])[0].astype(mx.float32)
        self._end(logits, "head", None)
        found = np.array(logits)
        self.recorder.toll = 0
        self.recorder.mark("host")
        return found

    @staticmethod
    def _toll() -> int:
        """Nanoseconds that evaluating next to nothing takes now: the median of a few."""
        one, times = mx.zeros((1,)), []
        for _ in range(_TOLLS):
            start = time.perf_counter_ns()
            mx.eval(one + 1)
            times.append(time.perf_counter_ns() - start)
        return round(statistics.median(times))

    def _layers(self, x: mx.array, cache: Any) -> mx.array:
        length = x.shape[1]
        mask = cache[0].make_mask(length, return_array=False, window_size=None)
        rotation = self.model.model._rotary.at(cache[0], length)
        for i, (layer, entry) in enumerate(zip(self.model.layers, cache, strict=True)):
            qkv, o, gate_up, down = (self._cut(site, i) for site in layer.sites())
            projected = qkv(x)
            self._end(projected, "qkv", i)
            q, kv = layer.ops.rope_kv(projected, *rotation, layer.plan.heads, layer.plan.kv_heads)
            out = side_by_side(attend(q, kv, entry, mask))
            self._end([out, entry.arrays], "attention", i)
            x = o(out, x)
            self._end(x, "o", i)
            both = gate_up(x)
            self._end(both, "gate_up", i)
            x = down.gated(both, layer.plan.act, x)
            self._end(x, "down", i)
        return x

    def _cut(self, site: Any, layer: int) -> Any:
        """A packed site with its quantiser apart; another, which goes module by module, is a part as a whole."""
        if not isinstance(site, PackedSite):
            return site
        ops: Any = _CutOps(site.ops, self.recorder, layer)
        return PackedSite(ops, site.static, site.arrays)

    def _end(self, arrays: Any, part: str, layer: int | None) -> None:
        mx.eval(arrays)
        self.recorder.mark(part, layer)

    def launches(self) -> int:
        """See Timed: of one token's graph without instruments, copies and cache writes included."""
        if self._launches is None:
            self._launches = _count(self.model)
        return self._launches

    def traffic(self, tokens: int, positions: int) -> dict[str, int]:
        """See Timed."""
        model, layers = self.model, self.model.layers
        size = {"float32": 4}.get(model.dtype, 2)
        embedding = _bytes(model.model.embed_tokens)
        rows = model.config.vocab_size

        def of(*names: str) -> int:
            return sum(_bytes(getattr(getattr(layer, room), name)) for layer in layers for room, name in
                       (n.split(".") for n in names))  # fmt: skip

        inside = [m for layer in layers for m in layer.modules() if isinstance(m, RMSNorm)]
        return {
            "embedding": tokens * embedding // rows,
            "norm": sum(map(_bytes, [*inside, model.model.norm])),
            "qkv": of("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "attention": cache_traffic(model.config, tokens, positions, size),
            "o": of("self_attn.o_proj"),
            "gate_up": of("mlp.gate_proj", "mlp.up_proj"),
            "down": of("mlp.down_proj"),
            "head": _bytes(model.lm_head) if "lm_head" in model else embedding,
        }


def _bytes(module: Any) -> int:
    """Of a module's own arrays, without those of modules inside it, but for the linear beside an adapter."""
    own = sum(value.nbytes for value in module.values() if isinstance(value, mx.array))
    return own + (_bytes(module.linear) if isinstance(module, LoRALinear) else 0)


def _count(model: Any) -> int:
    """Launches of one more token: a layer's times the layers, the embedding's and the head's, and the adapters' products
    and sums."""
    first = model.layers[0].self_attn.q_proj
    first = first.linear if isinstance(first, LoRALinear) else first
    scale, bits = getattr(first, "scale", None), getattr(first, "activation_bits", 16)
    kind = "tensor" if scale is None else SCALES[scale.ndim]
    hidden = mx.zeros((1, 1, model.config.hidden_size), model.model.dtype)
    ends = len(launches(lambda x: model.head(x[:, -1]), hidden))
    rows = len(launches(lambda ids: model.model.embed_tokens.rows(ids), mx.array([[0]])))
    if model.name == "mlx":
        layer = stock_launches(model.config, kind, bits)
    else:
        layer = kernel_launches(model.config, kind, bits, platform="cuda" if model.name == "cuda" else "metal")
    beside = [m for m in model.modules() if isinstance(m, LoRALinear)]
    more = sum(len(launches(m.beside, mx.zeros((1, 1, m.lora_a.shape[0])))) + 1 for m in beside)
    return len(layer) * len(model.layers) + ends + rows + more
