"""What a decoder that can be looked into tells, and what may be changed in it: numpy's and MLX's have `hooks`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

Tap = Callable[[str, np.ndarray, np.ndarray], None]


@dataclass
class Hooks:
    """tap: called with a module's name, its input and its output, float32 [M, K] and [M, N], in the order of computation:
    each linear ("model.layers.0.mlp.up_proj"), whose input is what it quantises, behind all norms; and each layer
    ("model.layers.0"). Linears that share an input are given the same array. Of sequences that MLX runs side by side, rows of
    padding are told too: give it one at a time.

    clips: by a linear's name, the largest |x| that its quantiser takes; larger ones become that. None of them by default.
    """

    tap: Tap | None = None
    clips: Mapping[str, float] = field(default_factory=dict)

    @property
    def used(self) -> bool:
        """Whether there is anything to tell or to change."""
        return self.tap is not None or bool(self.clips)
