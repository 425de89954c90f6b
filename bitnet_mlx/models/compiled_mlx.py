"""The layers' parts of fixed shape under mx.compile, for operations whose every call builds a kernel's text.

From one attention to the next is one compiled function, and one trace serves all layers: their arrays are its inputs.
(MLX's CUDA back end writes captured numbers into kernel texts, so that each layer would be compiled anew.) The cache
write and attention, whose shapes change with every token, stay outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bitnet_mlx.backends.mlx_affine import StockOps
from bitnet_mlx.backends.mlx_import import mx
from bitnet_mlx.models.layers_mlx import Plan, Rotation, Sites, attend, enter, leave
from bitnet_mlx.nn.site import PackedSite

# A site as a compiled function takes it: a tree of arrays, and the constants that are part of a trace's key.
_Flat = tuple[Any, Any]


class CompiledLayers:
    """Runs layers all of whose sites are packed."""

    def __init__(self, ops: StockOps, plan: Plan) -> None:
        def site(flat: _Flat) -> PackedSite:
            return PackedSite(ops, flat[1], flat[0])

        def first(x: mx.array, qkv: _Flat, rotation: Rotation) -> tuple[mx.array, mx.array]:
            return enter(ops.rope_kv, plan, site(qkv), x, rotation)

        def last(x: mx.array, out: mx.array, rest: Sequence[_Flat]) -> mx.array:
            return leave(plan, *map(site, rest), x, out)

        def between(
            x: mx.array, out: mx.array, rest: Sequence[_Flat], qkv: _Flat, rotation: Rotation
        ) -> tuple[mx.array, mx.array, mx.array]:
            x = last(x, out, rest)
            return (x, *first(x, qkv, rotation))

        self._first, self._between, self._last = mx.compile(first), mx.compile(between), mx.compile(last)

    def run(
        self, layers: Sequence[Sites], x: mx.array, caches: Sequence[Any], mask: Any, rotation: Rotation
    ) -> mx.array:
        """x [B, L, H] through all layers. The caches are written."""
        flat = [[(site.arrays, site.static) for site in sites] for sites in layers]
        q, kv = self._first(x, flat[0][0], rotation)
        for i, cache in enumerate(caches):
            out = attend(q, kv, cache, mask)
            if i + 1 < len(flat):
                x, q, kv = self._between(x, out, flat[i][1:], flat[i + 1][0], rotation)
            else:
                x = self._last(x, out, flat[i][1:])
        return x
