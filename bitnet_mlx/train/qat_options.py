"""What a run from float to ternary is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitnet_mlx.errors import ConfigError
from bitnet_mlx.train.blend import SCHEDULES
from bitnet_mlx.train.checks import check_numbers, flag
from bitnet_mlx.train.ste import STE, Kind

_POSITIVE = ("iters", "batch_size", "seq_length", "save_every", "steps_per_report")


@dataclass(frozen=True)
class QatOptions:
    """One run. Field names are the command line's flags.

    kl_weight: the share of the teacher's KL in the loss; the rest is cross entropy. blend_fraction: of the steps, after
    which all layers are ternary.
    """

    data: tuple[Path, ...]
    model: str
    output: Path
    teacher: str | None = None
    eval_data: tuple[Path, ...] = ()
    iters: int = 1000
    batch_size: int = 8
    seq_length: int = 256
    learning_rate: float = 1e-4
    warmup: int = 50
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    blend: str = "linear"
    blend_fraction: float = 0.5
    kl_weight: float = 0.5
    temperature: float = 1.0
    save_every: int = 200
    steps_per_report: int = 10
    resume: bool = False
    seed: int = 0
    ste: Kind = "standard"
    ste_clip: float = 1.5
    ste_sharpness: float = 2.0

    def __post_init__(self) -> None:
        check_numbers("qat", self, _POSITIVE, ("learning_rate", "grad_clip", "temperature"))
        assert self.estimator  # raises where it is not allowed
        for name in ("blend_fraction", "kl_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"[qat] {flag(name)} is {getattr(self, name)}; 0 to 1 is allowed")
        if self.warmup < 0 or self.weight_decay < 0:
            raise ConfigError(f"[qat] --warmup {self.warmup}, --weight-decay {self.weight_decay}; 0 or more is allowed")
        if self.blend not in SCHEDULES:
            raise ConfigError(f"[qat] --blend is {self.blend!r}; {', '.join(SCHEDULES)} are allowed")

    @property
    def estimator(self) -> STE:
        """How gradients pass through rounding. Raises ConfigError for what is not allowed."""
        return STE(self.ste, self.ste_clip, self.ste_sharpness)

    def course(self) -> dict[str, Any]:
        """The settings that decide every update: a run goes on only under the same ones."""
        names = (
            "model", "teacher", "iters", "batch_size", "seq_length", "learning_rate", "warmup", "weight_decay", "grad_clip",
            "blend", "blend_fraction", "kl_weight", "temperature", "seed", "ste",
            "ste_clip", "ste_sharpness",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}
