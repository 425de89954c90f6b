"""Beginnings of texts whose keys and values are kept for the next text that begins so, under a cap of bytes.

A tree of blocks of BLOCK tokens: a node's way from the root spells a beginning, and its excerpt holds the last block of
it. Texts that begin alike share their blocks, so bytes are held once. What was used least of late goes first, from the
ends of the tree; a beginning is always younger than what follows it. The engine's thread alone works here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bitnet_mlx.models.cache import Excerpt

BLOCK = 32


class _Node:
    """A block. key: its tokens. tick: when it was last used."""

    def __init__(self, parent: _Node | None, key: bytes, excerpt: Excerpt | None) -> None:
        self.parent, self.key, self.excerpt = parent, key, excerpt
        self.below: dict[bytes, _Node] = {}
        self.tick = 0

    @property
    def nbytes(self) -> int:
        return 0 if self.excerpt is None else self.excerpt.nbytes + len(self.key)


class Prefixes:
    """limit: bytes of excerpts and their tokens, 0 for nothing at all. nbytes: what is held now, never above it."""

    def __init__(self, limit: int) -> None:
        self.limit, self.nbytes = limit, 0
        self.evicted = 0
        self._root = _Node(None, b"", None)
        self._order: OrderedDict[_Node, None] = OrderedDict()  # least used first
        self._tick = 0
        self._each = 0  # bytes of a block, once there was one

    def __len__(self) -> int:
        return len(self._order)

    def restore(self, ids: Sequence[int], cache: Any) -> int:
        """Fill a cache that holds some first `ids` with the whole blocks of them that are kept here, all ids but the last at
        most, which must be computed. Returns how many positions it has gained."""
        before = cache.offset
        start = before // BLOCK
        path = self._path(ids[: len(ids) - 1])
        if len(path) <= start:
            return 0
        self._use(path)
        cache.trim(start * BLOCK)
        cache.extend([node.excerpt for node in path[start:]])
        return cache.offset - before

    def keep(self, ids: Sequence[int], cache: Any) -> None:
        """Copy the whole blocks that a cache of `ids` holds, where they are not here yet and there is room for them."""
        if not self.limit:
            return
        filled = ids[: cache.offset]
        path = self._path(filled)
        self._use(path)
        node = path[-1] if path else self._root
        for start, key in list(_blocks(filled))[len(path) :]:
            if not self._make_room(self._each):
                return
            excerpt = cache.copy(start, start + BLOCK)
            new = _Node(node, key, excerpt)
            self._each = new.nbytes
            if not self._make_room(new.nbytes):
                return
            node.below[key] = node = new
            path.append(new)
            self.nbytes += new.nbytes
            self._use(path)

    def _path(self, ids: Sequence[int]) -> list[_Node]:
        """The nodes along `ids` from the root on."""
        found, node = [], self._root
        if self._order:
            for _, key in _blocks(ids):
                below = node.below.get(key)
                if below is None:
                    break
                node = below
                found.append(node)
        return found

    def _use(self, path: Sequence[_Node]) -> None:
        """These are the youngest now, the first of them most of all."""
        self._tick += 1
        for node in reversed(path):
            node.tick = self._tick
            self._order[node] = None
            self._order.move_to_end(node)

    def _make_room(self, count: int) -> bool:
        """Let go of what was used least until `count` more bytes fit; False where that would take what is in use now."""
        if count > self.limit:
            return False
        while self.nbytes + count > self.limit:
            oldest = next(iter(self._order))
            if oldest.tick == self._tick:
                return False
            del self._order[oldest]
            assert not oldest.below and oldest.parent is not None
            del oldest.parent.below[oldest.key]
            self.nbytes -= oldest.nbytes
            self.evicted += 1
        return True


def next_block(ids: Sequence[int], offset: int) -> bytes | None:
    """The beginning that ends with the block at `offset`, to compare with others'; None where restore would not ask for it."""
    end = (offset // BLOCK + 1) * BLOCK
    return np.asarray(ids[:end], np.int32).tobytes() if end < len(ids) else None


def _blocks(ids: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    """(first position, tokens) of each whole block."""
    data = np.asarray(ids, np.int32)
    for start in range(0, len(data) - BLOCK + 1, BLOCK):
        yield start, data[start : start + BLOCK].tobytes()
