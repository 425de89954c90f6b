"""Looking into the MLX decoder: its layers module by module, with what goes in and comes out as numpy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitnet_mlx.backends.mlx_import import mx, nn
from bitnet_mlx.errors import ConfigError
from bitnet_mlx.models.hooks import Hooks
from bitnet_mlx.models.layers_mlx import Block, Rotation
from bitnet_mlx.nn.bitlinear import BitLinear
from bitnet_mlx.nn.site import Spy


def looked_into(
    hooks: Hooks, number: int, layer: Block, x: mx.array, mask: Any, cache: Any, rotation: Rotation
) -> mx.array:
    """Layer `number` on x [B, L, H], as Block's call; the hooks are told and their clips count."""
    prefix = f"model.layers.{number}"

    def look(*names: str) -> Spy:
        last: list[Any] = [None, None]

        def tell(i: int, seen: mx.array, y: mx.array) -> None:
            if hooks.tap is None:
                return
            if last[0] is not seen:
                last[:] = seen, _host(seen)
            hooks.tap(f"{prefix}.{names[i]}", last[1], _host(y))

        return Spy(tell, lambda i: hooks.clips.get(f"{prefix}.{names[i]}"))

    y = layer(x, mask, cache, rotation, look)
    if hooks.tap is not None:
        hooks.tap(prefix, _host(x), _host(y))
    return y


def linear_of(layer: nn.Module, name: str, x: np.ndarray, dtype: mx.Dtype, clip: float | None) -> np.ndarray:
    """A linear of a layer ("mlp.up_proj") alone: float32 x [M, K], behind all norms -> float32 [M, N]."""
    room, _, last = name.partition(".")
    module = layer[room][last]
    rows = mx.array(x)[None]
    if isinstance(module, BitLinear) and module.activation_bits == 8:
        to = module.ops.target(module.weight, module.scale, len(x), module.input_dims)
        rows = rows if clip is None else mx.clip(rows, -clip, clip)
        y = module(module.ops.quantize(rows, to)._replace(dtype=dtype))
    elif "norm" in module:
        raise ConfigError(f"[linear] {name} norms its own input and does not quantise it; it cannot be run alone")
    else:
        y = module(rows.astype(dtype))
    return _host(y)


def _host(x: mx.array) -> np.ndarray:
    """[B, L, W] of any float dtype -> float32 [B L, W]."""
    return np.array(x.astype(mx.float32)).reshape(-1, x.shape[-1])
