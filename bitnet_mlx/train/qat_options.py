"""What a run from float to ternary is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from bitnet_mlx.errors import ConfigError
from bitnet_mlx.train.blend import SCHEDULES
from bitnet_mlx.train.checks import check_numbers, flag
from bitnet_mlx.train.loop_options import DTYPES
from bitnet_mlx.train.ste_options import SteOptions


@dataclass(frozen=True, kw_only=True)
class QatOptions(SteOptions):
    """One run. Field names are the command line's flags.

    kl_weight: the share of the teacher's KL in the loss; the rest is cross entropy. blend_fraction: of the steps, after
    which all layers are ternary. dtype: of activations and products; None is the model's own.
    sub_norms: add norms before o_proj and down_proj.
    """

    COMMAND: ClassVar[str] = "qat"
    POSITIVE: ClassVar[Sequence[str]] = ("seq_length",)
    COURSE: ClassVar[Sequence[str]] = (
        "model", "teacher", "seq_length", "blend", "blend_fraction", "kl_weight", "temperature", "sub_norms",
    )  # fmt: skip

    data: tuple[Path, ...]
    model: str
    output: Path
    teacher: str | None = None
    eval_data: tuple[Path, ...] = ()
    seq_length: int = 256
    warmup: int = 50
    blend: str = "linear"
    blend_fraction: float = 0.5
    kl_weight: float = 0.5
    temperature: float = 1.0
    dtype: str | None = None
    sub_norms: bool = False
    save_every: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers("qat", self, (), ("temperature",))
        for name in ("blend_fraction", "kl_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"[qat] {flag(name)} is {getattr(self, name)}; 0 to 1 is allowed")
        if self.blend not in SCHEDULES:
            raise ConfigError(f"[qat] --blend is {self.blend!r}; {', '.join(SCHEDULES)} are allowed")
        if self.dtype not in (None, *DTYPES):
            raise ConfigError(f"[qat] --dtype is {self.dtype}; {' and '.join(DTYPES)} are allowed")
