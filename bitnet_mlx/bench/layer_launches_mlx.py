"""The launches of one decoder layer in a decode step: ours, by kernels or by stock operations, and mlx-lm's own."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from functools import partial
from typing import Any

from bitnet_mlx import _mlxlm
from bitnet_mlx.backends.kernels.launch import Launch
from bitnet_mlx.backends.kernels.ops import KernelOps
from bitnet_mlx.backends.kernels.run import DTYPES, run
from bitnet_mlx.backends.kernels.source import Platform
from bitnet_mlx.backends.mlx_affine import StockOps
from bitnet_mlx.backends.mlx_import import mx
from bitnet_mlx.bench.launches_mlx import launches
from bitnet_mlx.bench.plain_mlx import PlainBlock, PlainCache
from bitnet_mlx.bench.random_decoder import random_decoder
from bitnet_mlx.models.cache_mlx import KVCache
from bitnet_mlx.models.compiled_mlx import CompiledToken, Snapshot
from bitnet_mlx.models.config import DecoderConfig
from bitnet_mlx.models.decoder_mlx import SCALES, MlxModel
from bitnet_mlx.models.layers_mlx import Plan
from bitnet_mlx.models.rope_mlx import Rotary
from bitnet_mlx.models.weights import DecoderWeights
from bitnet_mlx.ternary import GROUP, TernaryTensor

PAST = 64  # positions behind the token


def kernel_launches(
    config: DecoderConfig, scale: str = "tensor", bits: int = 8, past: int = PAST, platform: Platform = "metal"
) -> list[str]:
    """Ours by kernels, as they are chosen unmeasured for a platform. scale: kind of the weights' scales. bits: of
    activations. past: positions behind the token.
    """
    runner = _empty if platform == "cuda" else partial(run, platform="metal", stream=mx.gpu)
    return ops_launches(config, KernelOps(platform, runner=runner), scale, bits, past)


def _empty(launch: Launch) -> list[mx.array]:
    """A launch of the same name, inputs and outputs that can be traced everywhere; MLX traces CUDA's kernels on CUDA alone."""
    source = launch.source
    kernel: Any = mx.fast.metal_kernel(source.name, list(source.inputs), list(source.outputs), "")
    return kernel(
        inputs=list(launch.inputs), grid=launch.grid, threadgroup=launch.threadgroup, stream=mx.gpu,
        output_shapes=[shape for shape, _ in launch.outputs], output_dtypes=[DTYPES[d] for _, d in launch.outputs],
    )  # fmt: skip


def stock_launches(config: DecoderConfig, scale: str = "tensor", bits: int = 8) -> list[str]:
    """The same layer by stock operations."""
    return ops_launches(config, StockOps(), scale, bits)


def ops_launches(
    config: DecoderConfig, ops: StockOps, scale: str = "tensor", bits: int = 8, past: int = PAST
) -> list[str]:
    """A layer of random weights at the configuration's shapes, in bfloat16, by any operations."""
    weights = random_decoder(replace(config, num_hidden_layers=1, vocab_size=64), scale=scale, activation_bits=bits)
    model = MlxModel(weights, "bfloat16", ops)
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    cache = KVCache()
    cache.append(mx.zeros((2, 1, kv_heads, past, dim), mx.bfloat16))
    rotation = Rotary(config).at(cache, 1)
    x = mx.zeros((1, 1, config.hidden_size), mx.bfloat16)
    if ops.attends(1, heads, kv_heads, dim, cache.room, mx.bfloat16):
        token = CompiledToken(ops, Plan.of(config), Snapshot(model.layers).flat or [])
        kv, recent = cache.open((2, 1, kv_heads, 1, dim), mx.bfloat16)
        lengths = mx.array(cache.lengths, mx.int32)
        mx.eval(kv, recent, lengths, rotation, x)
        return launches(lambda x: token.trace(x, rotation, lengths, [kv], [recent], token.numbers)[0], x)
    mx.eval(cache.kv, rotation, x)
    return launches(lambda x: model.layers[0](x, None, cache, rotation), x)


def mlxlm_launches(config: DecoderConfig) -> list[str] | None:
    """mlx-lm's BitNet layer, which leaves activations in bfloat16; None for families that it has no such layer for.

    Imports mlx_lm.
    """
    if not config.sub_norms or config.num_attention_heads * config.head_dim != config.hidden_size:
        return None
    family: Any = _mlxlm.module("models.bitnet")
    layers: Any = _mlxlm.module("models.bitlinear_layers")
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "rms_norm_eps")
    fields = {name: getattr(config, name) for name in names}
    block = family.TransformerBlock(
        family.ModelArgs("bitnet", num_hidden_layers=1, vocab_size=64, head_dim=config.head_dim, **fields)
    )
    block.set_dtype(mx.bfloat16)
    cache = _mlxlm.module("models.cache").KVCache()
    past = mx.zeros((1, config.num_key_value_heads, PAST, config.head_dim), mx.bfloat16)
    mx.eval(cache.update_and_fetch(past, past), cache.state, block.parameters())
    kernel = layers._bitlinear_kernel
    layers._bitlinear_kernel = partial(kernel, stream=mx.gpu)  # tracing needs no GPU where one is named
    try:
        return launches(lambda x: block(x, None, cache), mx.zeros((1, 1, config.hidden_size), mx.bfloat16))
    finally:
        layers._bitlinear_kernel = kernel


def plain_launches(config: DecoderConfig) -> list[str]:
    """The layer as plain MLX code has it, by stock 2-bit products (plain_mlx.py)."""
    block, cache = PlainBlock(config, "stock"), PlainCache()
    past = mx.zeros((1, config.num_key_value_heads, PAST, config.head_dim), mx.bfloat16)
    cache.update_and_fetch(past, past)
    mx.eval(cache.state, block.parameters())
    return launches(lambda x: block(x, cache), mx.zeros((1, 1, config.hidden_size), mx.bfloat16))


def counts(weights: DecoderWeights, kernels: Platform | None, past: int = PAST) -> dict[str, int]:
    """Launches of one layer of a model: ours (by a platform's kernels, `past` positions behind the token, or by
    stock operations), and of plain graphs of its shapes."""
    config = weights.config
    linear = next((x.weight for x in weights.linears.values() if isinstance(x.weight, TernaryTensor)), None)
    found = {}
    if linear is not None:
        kind, bits = SCALES[linear.scale.ndim], linear.activation_bits
        if kernels is None:
            layer = stock_launches(config, kind, bits)
        else:
            layer = kernel_launches(config, kind, bits, past, kernels)
        found["ours"] = len(layer)
    if all(k % GROUP == 0 for _, k in config.linear_shapes().values()):
        found["plain 2-bit"] = len(plain_launches(config))
    if importlib.util.find_spec("mlx_lm") and (theirs := mlxlm_launches(config)):
        found["mlx-lm's bitnet"] = len(theirs)
    return found
