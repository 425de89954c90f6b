"""The layers under mx.compile, for operations whose every call builds a kernel's text, which takes the host longer than
the kernel takes a GPU.

A token by itself is one compiled function from the first layer to the last (CompiledToken). Several are compiled from
one attention to the next (CompiledLayers), and one trace serves all layers, whose arrays are its inputs; the cache write
and attention, whose shapes change with every call, stay outside.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from bitnet_mlx.backends.mlx_affine import StockOps
from bitnet_mlx.backends.mlx_import import mx
from bitnet_mlx.models.cache_mlx import KVCache
from bitnet_mlx.models.layers_mlx import Block, Plan, Rotation, attend, enter, leave, side_by_side
from bitnet_mlx.nn.site import PackedSite
from bitnet_mlx.nn.watched import changes

# A site as a compiled function takes it: a tree of arrays, and the constants that are part of a trace's key.
_Flat = tuple[Any, Any]
_LENGTHS, _CAPACITIES = 16, 8  # traces that are kept: a trace holds its kernels' texts
_Made = TypeVar("_Made")


class Latest(Generic[_Made]):
    """The last `count` things made, each for a key. A compiled function that is dropped takes its traces along."""

    def __init__(self, count: int, make: Callable[[], _Made]) -> None:
        self._count, self._make = count, make
        self._held: OrderedDict[Hashable, _Made] = OrderedDict()

    def get(self, key: Hashable) -> _Made:
        """What was made for a key, or a new one."""
        if key not in self._held:
            self._held[key] = self._make()
        self._held.move_to_end(key)
        while len(self._held) > self._count:
            self._held.popitem(last=False)
        return self._held[key]


class Snapshot:
    """All layers' sites, and whether they still stand: looking at every module anew takes as long as a short step,
    so that is done where some watched module changed.

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
        self._seen = changes()

    def stands(self, layers: Sequence[Block]) -> bool:
        """Whether no module, no array and no mode was exchanged since."""
        if len(layers) != len(self._layers):
            return False
        for layer, held in zip(layers, self._layers, strict=True):
            if layer is not held:
                return False
        seen = changes()
        if seen == self._seen:
            return True
        for module, name, value in self._held:
            if module.get(name) is not value:
                return False
        if not all(module.training is mode for module, mode in self._modes):
            return False
        self._seen = seen
        return True


class CompiledLayers:
    """Runs layers all of whose sites are packed."""

    def __init__(self, ops: StockOps, plan: Plan) -> None:
        self._ops, self._plan = ops, plan
        self._parts = Latest(_LENGTHS, lambda: _parts(ops, plan))
        self._snapshot: Snapshot | None = None
        self._token: CompiledToken | None = None

    def run(
        self,
        layers: Sequence[Block],
        x: mx.array,
        caches: Sequence[Any],
        mask: Any,
        rotation: Rotation,
        begin: Callable[[int, mx.array], None],
    ) -> mx.array | None:
        """x [B, L, H] through all layers, or None where some site is not packed now. The caches are written.

        begin: told each layer's number and input, where a graph is built layer by layer.
        """
        if self._snapshot is None or not self._snapshot.stands(layers):
            self._snapshot, self._token = Snapshot(layers), None
        flat = self._snapshot.flat
        if flat is None:
            return None
        b, length, _ = x.shape
        if length == 1 and mask is None and self._fused(x, rotation, caches):
            if self._token is None:
                self._token = CompiledToken(self._ops, self._plan, flat)
            return self._token(x, caches, rotation)
        first, between, last = self._parts.get((b, length))
        q, kv = first(x, flat[0][0], rotation)
        for i, cache in enumerate(caches):
            begin(i, x)
            out = attend(q, kv, cache, mask)
            if i + 1 < len(flat):
                x, q, kv = between(x, out, flat[i][1:], flat[i + 1][0], rotation)
            else:
                x = last(x, out, flat[i][1:])
        return x

    def _fused(self, x: mx.array, rotation: Rotation, caches: Sequence[Any]) -> bool:
        """Whether a single token may take the attention that writes the cache: all caches are ours and of one length."""
        plan, first = self._plan, caches[0]
        if not isinstance(first, KVCache):
            return False
        alike = all(isinstance(cache, KVCache) and cache.lengths == first.lengths for cache in caches)
        dim = 2 * rotation[0].shape[-1]
        return alike and self._ops.attends(x.shape[0], plan.heads, plan.kv_heads, dim, first.room, x.dtype)


def _parts(ops: StockOps, plan: Plan) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """Compiled: the way to the first attention, from one to the next, and from the last one on."""

    def site(flat: _Flat) -> PackedSite:
        return PackedSite(ops, flat[1], flat[0])

    def first(x: mx.array, qkv: _Flat, rotation: Rotation) -> tuple[mx.array, mx.array]:
        return enter(ops.rope_kv, plan, site(qkv), x, rotation)

    def last(x: mx.array, out: mx.array, rest: Sequence[_Flat]) -> mx.array:
        o, gate_up, down = map(site, rest)
        return leave(plan, o, gate_up, down, x, side_by_side(out))

    def between(
        x: mx.array, out: mx.array, rest: Sequence[_Flat], qkv: _Flat, rotation: Rotation
    ) -> tuple[mx.array, mx.array, mx.array]:
        x = last(x, out, rest)
        return (x, *first(x, qkv, rotation))

    return mx.compile(first), mx.compile(between), mx.compile(last)


class CompiledToken:
    """All layers for one more token of each sequence.

    The layers' arrays are constants of the trace: handing them over at each call would take as long as a short layer.
    Single numbers are inputs all the same: MLX writes captured ones into the texts of the kernels that it fuses, and each
    layer would be compiled anew.
    """

    def __init__(self, ops: StockOps, plan: Plan, flat: list[list[_Flat]]) -> None:
        self._ops, self._plan, self._flat = ops, plan, flat
        self.numbers = [a for four in flat for arrays, _ in four for a in _leaves(arrays) if a.size == 1]
        self._traces = Latest(_CAPACITIES, lambda: mx.compile(self.trace))

    def __call__(self, x: mx.array, caches: Sequence[KVCache], rotation: Rotation) -> mx.array:
        """x [B, 1, H] -> the same; each cache holds one position more."""
        b = x.shape[0]
        heads, dim = self._plan.kv_heads, 2 * rotation[0].shape[-1]
        opened = [cache.open((2, b, heads, 1, dim), x.dtype) for cache in caches]
        lengths = mx.array(caches[0].lengths, mx.int32)
        run = self._traces.get((b, opened[0][0].shape[3]))
        x, recent = run(x, rotation, lengths, [kv for kv, _ in opened], [r for _, r in opened], self.numbers)
        for cache, rows in zip(caches, recent, strict=True):
            cache.close(rows)
        return x

    def trace(
        self,
        x: mx.array,
        rotation: Rotation,
        lengths: mx.array,
        past: Sequence[mx.array],
        recent: Sequence[mx.array],
        numbers: Sequence[mx.array],
    ) -> tuple[mx.array, list[mx.array]]:
        """What is compiled: x [B, 1, H] and each layer's cache -> x, and each layer's `recent` with one position more."""
        plan, given, extended = self._plan, iter(numbers), []
        for four, kv, rows in zip(self._flat, past, recent, strict=True):
            qkv, o, gate_up, down = (PackedSite(self._ops, static, _given(arrays, given)) for arrays, static in four)
            out, rows = self._ops.decode_attention(qkv(x), *rotation, kv, rows, lengths, plan.heads, plan.kv_heads)
            extended.append(rows)
            x = leave(plan, o, gate_up, down, x, out)
        return x, extended


def _leaves(arrays: Any) -> Iterator[mx.array]:
    packed, norm = arrays
    yield from (a for a in (*packed, norm) if a is not None)


def _given(arrays: Any, numbers: Iterator[mx.array]) -> Any:
    """The tree of `arrays` with single numbers taken from `numbers`, in the order of `_leaves`."""
    packed, norm = arrays
    *packed, norm = [next(numbers) if a is not None and a.size == 1 else a for a in (*packed, norm)]
    return tuple(packed), norm
