"""The layers of the MLX decoder, and a token's way through one of them.

    [norm + quantise] [q, k, v] [rope] [cache write] attention [sub-norm + quantise] [o + residual]
    [norm + quantise] [gate, up] [act * up + sub-norm + quantise] [down + residual]

A bracket is one operation, and one launch where operations are our kernels. What is not packed, was replaced, or is
being trained through, is called module by module (nn/site.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from bitnet_mlx.backends.mlx_affine import StockOps, rope_kv
from bitnet_mlx.backends.mlx_import import mx, nn
from bitnet_mlx.models.cache_mlx import KVCache, halves
from bitnet_mlx.models.config import DecoderConfig
from bitnet_mlx.models.ragged_mlx import Ragged
from bitnet_mlx.models.weights import DecoderWeights
from bitnet_mlx.nn.dense import linear_layer
from bitnet_mlx.nn.head_norms import HeadNorms
from bitnet_mlx.nn.joined import Joined
from bitnet_mlx.nn.lora import beside
from bitnet_mlx.nn.norm import RMSNorm
from bitnet_mlx.nn.site import ModuleSite, PackedSite, Spy, site
from bitnet_mlx.nn.watched import Watched

QKV, GATE_UP = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")
Site = PackedSite | ModuleSite
EntrySite = Site | HeadNorms
Rotation = tuple[mx.array, mx.array]  # cos and sin of the step's positions
Rotate = Callable[..., tuple[mx.array, mx.array]]  # rope_kv of some operations
Look = Callable[..., Spy]  # a spy for the linears of these names inside a layer


class Parts:
    """What the modules of one model are built from: its weights, by Hugging Face name, and its operations."""

    def __init__(self, weights: DecoderWeights, ops: StockOps) -> None:
        self.weights, self.config, self.ops = weights, weights.config, ops

    def linear(self, layer: int, name: str) -> nn.Module:
        """Linear `name` ("mlp.up_proj") of a layer."""
        linear = self.weights.layer_linear(layer, name)
        module = linear_layer(linear.weight, linear.bias, self.ops)
        if linear.norm is not None:
            module.norm = RMSNorm(linear.norm, self.config.linear_norm_eps, self.ops)
        return module if linear.adapter is None else beside(module, linear.adapter)

    def norm(self, name: str) -> RMSNorm:
        """A norm by its full name."""
        return RMSNorm(self.weights.norms[name], self.config.rms_norm_eps, self.ops)

    def layer_norm(self, layer: int, name: str) -> RMSNorm:
        """A norm by its name inside a layer."""
        return self.norm(f"model.layers.{layer}.{name}")


@dataclass(frozen=True)
class Plan:
    """What the way through a layer depends on, besides its sites."""

    heads: int
    kv_heads: int
    act: str

    @classmethod
    def of(cls, config: DecoderConfig) -> Plan:
        """From a model's configuration."""
        return cls(config.num_attention_heads, config.num_key_value_heads, config.hidden_act)


class Sites(NamedTuple):
    """The four places of a layer."""

    qkv: EntrySite
    o: Site
    gate_up: Site
    down: Site


def enter(rotate: Rotate, plan: Plan, qkv: EntrySite, x: mx.array, rotation: Rotation) -> tuple[mx.array, mx.array]:
    """The way before attention: x [B, L, H] -> q [B, heads, L, D] and kv [2, B, kv heads, L, D], rotated by `rotate`."""
    return rotate(qkv(x), *rotation, plan.heads, plan.kv_heads)


def leave(plan: Plan, o: Site, gate_up: Site, down: Site, x: mx.array, out: mx.array) -> mx.array:
    """The way after it: the layer's input x [B, L, H] and attention's output [B, L, heads * D] -> the next layer's."""
    x = o(out, x)
    return down.gated(gate_up(x), plan.act, x)


def side_by_side(out: mx.array) -> mx.array:
    """Attention's output [B, heads, L, D] -> [B, L, heads * D]."""
    b, _, length, _ = out.shape
    return out.transpose(0, 2, 1, 3).reshape(b, length, -1)


class Attention(Watched):
    """Grouped-query attention's modules."""

    def __init__(self, parts: Parts, layer: int) -> None:
        super().__init__()
        self.q_proj = parts.linear(layer, "self_attn.q_proj")
        self.k_proj = parts.linear(layer, "self_attn.k_proj")
        self.v_proj = parts.linear(layer, "self_attn.v_proj")
        self.o_proj = parts.linear(layer, "self_attn.o_proj")
        if parts.config.sub_norms:
            self.attn_sub_norm = parts.layer_norm(layer, "self_attn.attn_sub_norm")
        if parts.config.qk_norms:
            self.q_norm = parts.layer_norm(layer, "self_attn.q_norm")
            self.k_norm = parts.layer_norm(layer, "self_attn.k_norm")
        self._heads = parts.config.num_attention_heads, parts.config.num_key_value_heads
        self._qkv, self._o = Joined([self.q_proj, self.k_proj, self.v_proj]), Joined([self.o_proj])

    def sites(self, norm: nn.Module, look: Look | None = None) -> tuple[EntrySite, Site]:
        """(q, k and v behind `norm`; o behind the sub-norm)."""
        spies = (None, None) if look is None else (look(*QKV), look("self_attn.o_proj"))
        qkv = site(self._qkv, [self.q_proj, self.k_proj, self.v_proj], norm, self.training, spies[0])
        return (
            HeadNorms(qkv, self.q_norm, self.k_norm, *self._heads) if "q_norm" in self else qkv,
            site(self._o, [self.o_proj], self.get("attn_sub_norm"), self.training, spies[1]),
        )


class FeedForward(Watched):
    """The modules of down(norm(act(gate(x)) * up(x)))."""

    def __init__(self, parts: Parts, layer: int) -> None:
        super().__init__()
        self.gate_proj = parts.linear(layer, "mlp.gate_proj")
        self.up_proj = parts.linear(layer, "mlp.up_proj")
        self.down_proj = parts.linear(layer, "mlp.down_proj")
        if parts.config.sub_norms:
            self.ffn_sub_norm = parts.layer_norm(layer, "mlp.ffn_sub_norm")
        self._gate_up, self._down = Joined([self.gate_proj, self.up_proj]), Joined([self.down_proj])

    def sites(self, norm: nn.Module, look: Look | None = None) -> tuple[Site, Site]:
        """(gate and up behind `norm`; down behind the sub-norm)."""
        spies = (None, None) if look is None else (look(*GATE_UP), look("mlp.down_proj"))
        return (
            site(self._gate_up, [self.gate_proj, self.up_proj], norm, self.training, spies[0]),
            site(self._down, [self.down_proj], self.get("ffn_sub_norm"), self.training, spies[1]),
        )


class Block(Watched):
    """One layer of the decoder."""

    def __init__(self, parts: Parts, layer: int) -> None:
        super().__init__()
        self.plan, self.ops = Plan.of(parts.config), parts.ops
        self.self_attn = Attention(parts, layer)
        self.mlp = FeedForward(parts, layer)
        self.input_layernorm = parts.layer_norm(layer, "input_layernorm")
        self.post_attention_layernorm = parts.layer_norm(layer, "post_attention_layernorm")

    def sites(self, look: Look | None = None) -> Sites:
        """What stands at the layer's four places now."""
        return Sites(
            *self.self_attn.sites(self.input_layernorm, look), *self.mlp.sites(self.post_attention_layernorm, look)
        )

    def __call__(
        self, x: mx.array, mask: mx.array | str | None, cache: Any, rotation: Rotation, look: Look | None = None
    ) -> mx.array:
        """x: [B, L, H]. The cache is written."""
        sites = self.sites(look)
        rotate = partial(rope_kv, training=True) if self.training else self.ops.rope_kv
        q, kv = enter(rotate, self.plan, sites.qkv, x, rotation)
        return leave(self.plan, *sites[1:], x, side_by_side(attend(q, kv, cache, mask)))


def attend(q: mx.array, kv: mx.array, cache: Any, mask: mx.array | str | None) -> mx.array:
    """The cache write, and attention: q [B, heads, L, D] against all keys and values there are now, of the same shape."""
    if isinstance(cache, Ragged):
        return cache.attend(q, kv, attend)
    if cache is None:
        k, v = halves(kv)
    elif isinstance(cache, KVCache):
        k, v = cache.append(kv)
    else:
        k, v = cache.update_and_fetch(*halves(kv))
    scale = q.shape[-1] ** -0.5
    if hasattr(cache, "bits"):
        from bitnet_mlx import _mlxlm

        base = _mlxlm.module("models.base")
        return base.scaled_dot_product_attention(q, k, v, cache, scale=scale, mask=mask)
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
