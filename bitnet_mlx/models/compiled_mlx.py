"""The layers' parts of fixed shape under mx.compile, for operations whose every call builds a kernel's text.

From one attention to the next is one compiled function, and one trace serves all layers: their arrays are its inputs.
(MLX's CUDA back end writes captured numbers into kernel texts, so that each layer would be compiled anew.) The cache
write and attention, whose shapes change with every token, stay outside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bitnet_mlx.backends.mlx_affine import StockOps
from bitnet_mlx.backends.mlx_import import mx
from bitnet_mlx.models.layers_mlx import Block, Plan, Rotation, attend, enter, leave
from bitnet_mlx.nn.site import PackedSite

# A site as a compiled function takes it: a tree of arrays, and the constants that are part of a trace's key.
_Flat = tuple[Any, Any]


class Snapshot:
    """All layers' sites, and whether they still stand: looking at every module anew takes as long as a short step.

    flat: for each layer its four sites, or None where some site is not packed.
    """

    def __init__(self, layers: Sequence[Block]) -> None:
        sites = [layer.sites() for layer in layers]
        packed = all(isinstance(site, PackedSite) for four in sites for site in four)
        self.flat: list[list[_Flat]] | None = (
            [[(site.arrays, site.static) for site in four if isinstance(site, PackedSite)] for four in sites]
            if packed
            else None
        )
        modules = [module for layer in layers for module in layer.modules()]
        self._layers = list(layers)
        self._held = [(module, name, value) for module in modules for name, value in module.items()]
        self._modes = [(module, module.training) for module in modules if module.children()]

    def stands(self, layers: Sequence[Block]) -> bool:
        """Whether no module, no array and no mode was exchanged since."""
        if len(layers) != len(self._layers):
            return False
        for layer, held in zip(layers, self._layers, strict=True):
            if layer is not held:
                return False
        for module, name, value in self._held:
            if module.get(name) is not value:
                return False
        return all(module.training is mode for module, mode in self._modes)


class CompiledLayers:
    """Runs layers all of whose sites are packed."""

    def __init__(self, ops: StockOps, plan: Plan) -> None:
        def site(flat: _Flat) -> PackedSite:
            return PackedSite(ops, flat[1], flat[0])

        def first(x: mx.array, qkv: _Flat, rotation: Rotation) -> tuple[mx.array, mx.array]:
            return enter(ops.rope_kv, plan, site(qkv), x, rotation)

        def last(x: mx.array, out: mx.array, rest: Sequence[_Flat]) -> mx.array:
            o, gate_up, down = map(site, rest)
            return leave(plan, o, gate_up, down, x, out)

        def between(
            x: mx.array, out: mx.array, rest: Sequence[_Flat], qkv: _Flat, rotation: Rotation
        ) -> tuple[mx.array, mx.array, mx.array]:
            x = last(x, out, rest)
            return (x, *first(x, qkv, rotation))

        self._first, self._between, self._last = mx.compile(first), mx.compile(between), mx.compile(last)
        self._snapshot: Snapshot | None = None

    def flat(self, layers: Sequence[Block]) -> list[list[_Flat]] | None:
        """What `run` takes, if all sites of all layers are packed now."""
        if self._snapshot is None or not self._snapshot.stands(layers):
            self._snapshot = Snapshot(layers)
        return self._snapshot.flat

    def run(
        self,
        flat: list[list[_Flat]],
        x: mx.array,
        caches: Sequence[Any],
        mask: Any,
        rotation: Rotation,
        begin: Callable[[int, mx.array], None],
    ) -> mx.array:
        """x [B, L, H] through all layers. The caches are written. begin: told each layer's number and input."""
        q, kv = self._first(x, flat[0][0], rotation)
        for i, cache in enumerate(caches):
            begin(i, x)
            out = attend(q, kv, cache, mask)
            if i + 1 < len(flat):
                x, q, kv = self._between(x, out, flat[i][1:], flat[i + 1][0], rotation)
            else:
                x = self._last(x, out, flat[i][1:])
        return x
