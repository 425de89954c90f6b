"""An MLX sequence cache as plain arrays, and back: see models/cache_state.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from bitnet_mlx.backends.mlx_import import mx
from bitnet_mlx.models.cache_mlx import KVCache, SequenceCache
from bitnet_mlx.nn.lora import LoRALinear

_NAMES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint32: "U32"}
_TYPES = {name: dtype for dtype, name in _NAMES.items()}
Stored = tuple[np.ndarray, str]


def stored(array: mx.array) -> Stored:
    """(values, safetensors' name of their type); bfloat16 comes as uint16, which NumPy has."""
    name = _NAMES[array.dtype]
    return np.array(array.view(mx.uint16) if name == "BF16" else array), name


def taken(found: Stored) -> mx.array:
    """The MLX array of what `stored` gave."""
    array = mx.array(np.ascontiguousarray(found[0]))
    return array.view(mx.bfloat16) if found[1] == "BF16" else array


def tensors(cache: SequenceCache) -> Iterator[tuple[str, Callable[[], Stored]]]:
    """(name, a call that gives the array) of what each layer holds; positions are axis -2."""
    for layer, entry in enumerate(cache):
        parts: list[Any] = list(entry.state[:2]) if isinstance(entry, KVCache) else entry.parts
        for place, part in enumerate(parts):
            yield f"layers.{layer}.{place}", lambda part=part: stored(part[..., : cache.offset, :])


def restore(cache: SequenceCache, array: Callable[[str], Stored], offset: int) -> None:
    """Fill an empty cache."""
    for layer, entry in enumerate(cache):
        if isinstance(entry, KVCache):
            entry.state = (taken(array(f"layers.{layer}.0")), taken(array(f"layers.{layer}.1")), offset)
        else:
            entry.parts = [taken(array(f"layers.{layer}.{place}")) for place in range(1 if entry.small == 16 else 3)]
            mx.eval(entry.parts)
            entry.offset = offset


def parameters(model: Any) -> Iterator[tuple[str, Stored]]:
    """Every parameter of a model, by name, and the factors of its adapters."""
    from mlx.utils import tree_flatten

    found: Any = tree_flatten(model.parameters())
    for name, array in sorted(found):
        yield name, stored(array) if array.dtype in _NAMES else (np.array(array), str(array.dtype))
    for name, module in sorted(model.named_modules()):
        if isinstance(module, LoRALinear):
            yield f"{name}.scale", (np.array(module.scale, np.float32), "F32")
