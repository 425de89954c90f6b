"""What every kind of training is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from bitnet_mlx.errors import ConfigError
from bitnet_mlx.train.checks import check_numbers
from bitnet_mlx.train.optimizer import NAMES

DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """Field names are the command line's flags. A step's gradients come from `grad_accumulation_steps` batches of
    `batch_size`, on each of the processes that train together; `iters` counts steps."""

    COMMAND: ClassVar[str] = "train"
    POSITIVE: ClassVar[Sequence[str]] = ()
    COURSE: ClassVar[Sequence[str]] = ()

    iters: int = 1000
    batch_size: int = 8
    learning_rate: float = 1e-4
    warmup: int = 0
    weight_decay: float = 0.0
    optimizer: str = "adamw"
    grad_clip: float = 1.0
    grad_accumulation_steps: int = 1
    grad_checkpoint: bool = False
    save_every: int = 100
    steps_per_report: int = 10
    max_seconds: float | None = None
    resume: bool = False
    seed: int = 0
    plot: Path | None = None
    rank_timeout: float = 600.0

    def __post_init__(self) -> None:
        counts = ("iters", "batch_size", "grad_accumulation_steps", "save_every", "steps_per_report")
        check_numbers(self.COMMAND, self, (*counts, *self.POSITIVE), ("learning_rate", "grad_clip", "rank_timeout"))
        if self.warmup < 0 or not 0 <= self.weight_decay < float("inf"):
            raise ConfigError(
                f"[{self.COMMAND}] --warmup {self.warmup}, --weight-decay {self.weight_decay}; 0 or more is allowed"
            )
        if self.optimizer not in NAMES:
            raise ConfigError(f"[{self.COMMAND}] --optimizer is {self.optimizer!r}; {', '.join(NAMES)} are allowed")
        if self.plot is not None:
            from bitnet_mlx.profile.plots import check_path

            check_path(self.plot)
            if not self.plot.resolve().parent.is_dir():
                raise ConfigError(f"[{self.COMMAND}] {self.plot} lies in a folder that is not there; make it first")

    def course(self, ranks: int = 1) -> dict[str, Any]:
        """The settings that decide every update: a run goes on only under the same ones. Batches may be spread over other
        numbers of processes meanwhile, as long as a step has as many."""
        names = ("iters", "batch_size", "learning_rate", "warmup", "weight_decay", "optimizer", "grad_clip", "seed")
        found = {name: getattr(self, name) for name in (*names, *self.COURSE)}
        return {**found, "batches_a_step": self.grad_accumulation_steps * ranks}
