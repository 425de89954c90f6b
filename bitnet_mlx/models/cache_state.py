"""A sequence's cache as plain arrays, and back, for every engine; and what tells one model from another.

Arrays are named "layers.<i>.<place>", keys first; their axis -2 is positions. On the numpy and cpu engines they are float32
[num_key_value_heads, positions, head_dim], on MLX what its cache holds, with a batch axis in front.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import numpy as np

from bitnet_mlx.backends import ON_MLX
from bitnet_mlx.models.cache import KVCache
from bitnet_mlx.models.decoder import Decoder

Stored = tuple[np.ndarray, str]  # values, and safetensors' name of their type


def tensors(decoder: Decoder, cache: Any) -> Iterator[tuple[str, Callable[[], Stored]]]:
    """(name, a call that gives the array) of all filled positions, one after another."""
    if decoder.name in ON_MLX:
        from bitnet_mlx.models import cache_state_mlx

        yield from cache_state_mlx.tensors(cache)
        return
    for layer, pair in enumerate(zip(cache.keys, cache.values, strict=True)):
        for place, part in enumerate(pair):
            yield f"layers.{layer}.{place}", lambda part=part: (part[:, : cache.offset], "F32")


def restore(decoder: Decoder, cache: Any, array: Callable[[str], Stored], offset: int) -> None:
    """Fill an empty cache of this decoder with `offset` positions that `tensors` gave. array: by name."""
    if decoder.name in ON_MLX:
        from bitnet_mlx.models import cache_state_mlx

        cache_state_mlx.restore(cache, array, offset)
        return
    assert isinstance(cache, KVCache)
    cache.reserve(offset)
    for layer in range(len(cache.keys)):
        cache.keys[layer][:, :offset] = array(f"layers.{layer}.0")[0]
        cache.values[layer][:, :offset] = array(f"layers.{layer}.1")[0]
    cache.offset = offset


def fingerprint(decoder: Decoder) -> str:
    """Hex digits that change with any weight, with the config, and with what an engine makes of them (head bits, adapter)."""
    digest = hashlib.blake2b(repr(decoder.config).encode(), digest_size=16)
    for name, array in _weights(decoder):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        if array.nbytes:
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _weights(decoder: Any) -> Iterator[tuple[str, np.ndarray]]:
    if decoder.name in ON_MLX:
        from bitnet_mlx.models import cache_state_mlx

        for name, (array, kind) in cache_state_mlx.parameters(decoder):
            yield f"{name} {kind}", array
        return
    weights = decoder.weights
    yield from _arrays("embed_tokens", weights.embed_tokens)
    if weights.lm_head is not weights.embed_tokens:
        yield from _arrays("lm_head", weights.lm_head)
    for name in sorted(weights.linears):
        yield from _arrays(name, weights.linears[name])
    yield from sorted(weights.norms.items())


def _arrays(name: str, value: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of a dataclass, those of its dataclasses among them; its other values are part of their names."""
    if isinstance(value, np.ndarray):
        yield name, value
    elif hasattr(value, "__dataclass_fields__"):
        plain = [str(v) for f in fields(value) if isinstance(v := getattr(value, f.name), (int, float, str, tuple))]
        for field in fields(value):
            yield from _arrays(f"{name}.{field.name} {plain}", getattr(value, field.name))
