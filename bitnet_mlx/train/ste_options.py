"""What `train` and `qat` are told about gradients through rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bitnet_mlx.train.loop_options import LoopOptions
from bitnet_mlx.train.ste import STANDARD, STE, Kind


@dataclass(frozen=True, kw_only=True)
class SteOptions(LoopOptions):
    """Field names are the command line's flags."""

    ste: Kind = STANDARD.kind
    ste_clip: float = STANDARD.clip
    ste_sharpness: float = STANDARD.sharpness

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.estimator  # which checks its fields

    @property
    def estimator(self) -> STE:
        """Raises ConfigError for what is not allowed."""
        return STE(self.ste, self.ste_clip, self.ste_sharpness)

    def course(self, ranks: int = 1) -> dict[str, Any]:
        return {**super().course(ranks), "ste": [self.ste, self.ste_clip, self.ste_sharpness]}
