"""Token ids and the order in which training reads them.

The order is a function of the seed and the batch's number alone: the ids are cut into windows of L + 1, starting at a shift that
changes with every pass, and the windows are taken in a random order. So a run that stops at any step can go on exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bitnet_mlx.errors import ConfigError, FormatError

ID_SUFFIXES = (".npy", ".bin")


def read_ids(path: Path, vocab_size: int) -> np.ndarray:
    """Ready token ids, uint16 [tokens]: a .npy file, or a .bin file of little-endian uint16.

    Raises FormatError where the file holds something else or an id is outside of the vocabulary.
    """
    if path.suffix == ".bin":
        if path.stat().st_size % 2:
            raise FormatError(f"[train] {path} has an odd number of bytes; a .bin file holds uint16 token ids")
        ids = np.fromfile(path, "<u2")
    else:
        try:
            ids = np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise FormatError(f"[train] {path} is no .npy file: {error}; give uint16 token ids") from error
    if ids.dtype != np.uint16 or ids.ndim != 1 or not len(ids):
        raise FormatError(f"[train] {path} holds {ids.dtype} {ids.shape}; a row of uint16 token ids is needed")
    if int(ids.max()) >= vocab_size:
        raise FormatError(f"[train] {path} holds id {ids.max()}, but the vocabulary has {vocab_size} entries")
    return ids


@dataclass(frozen=True)
class Windows:
    """Which windows of `tokens` ids belong to each batch: `length` inputs and one more id, `batch` windows."""

    tokens: int
    length: int
    batch: int
    seed: int

    def __post_init__(self) -> None:
        if self.batch < 1 or self.length < 1:
            raise ConfigError(
                f"[train] batch size {self.batch} and sequence length {self.length}; both must be 1 or more"
            )
        if self.tokens < self.length + 1:
            raise ConfigError(
                f"[train] the data holds {self.tokens} tokens, fewer than one sequence of {self.length} and its target; "
                "lower --seq-length or give more text"
            )

    @property
    def per_epoch(self) -> int:
        """Windows in one pass over the data; the shift costs at most one."""
        return max(1, (self.tokens - self.length) // self.length)

    def position(self, index: int) -> dict[str, int]:
        """Where batch `index` begins: which pass over the data, and which window of its order."""
        epoch, window = divmod(index * self.batch, self.per_epoch)
        return {"epoch": epoch, "window": window}

    def starts(self, number: int) -> np.ndarray:
        """First position of each window of a batch, counted from 0 over all passes: int32 [batch]."""
        index = np.arange(number * self.batch, (number + 1) * self.batch, dtype=np.int64)
        epochs = index // self.per_epoch
        starts = np.empty(self.batch, np.int32)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            starts[chosen] = _epoch_starts(self, int(epoch))[index[chosen] % self.per_epoch]
        return starts


_last: dict[tuple[Windows, int], np.ndarray] = {}


def _epoch_starts(windows: Windows, epoch: int) -> np.ndarray:
    """All starts of one pass, in reading order; the last two passes asked for are kept."""
    key = (windows, epoch)
    if key not in _last:
        rng = np.random.Generator(np.random.PCG64([windows.seed, epoch]))
        room = windows.tokens - windows.per_epoch * windows.length  # at least 1: the target of the last window
        shift = int(rng.integers(0, min(room, windows.length)))
        while len(_last) > 1:
            _last.pop(next(iter(_last)))
        _last[key] = shift + windows.length * rng.permutation(windows.per_epoch).astype(np.int32)
    return _last[key]
