"""What a run from float to ternary is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from bitnet_mlx.errors import ConfigError
from bitnet_mlx.train.blend import SCHEDULES
from bitnet_mlx.train.checks import check_numbers, flag
from bitnet_mlx.train.loop_options import DTYPES
from bitnet_mlx.train.ste_options import SteOptions

HIDDEN_LOSSES = ("cosine", "mse")


@dataclass(frozen=True, kw_only=True)
class QatOptions(SteOptions):
    """One run. Field names are the command line's flags.

    kl_weight: the share of the teacher's KL in the loss; the rest is cross entropy. hidden_weight, attention_weight: of the
    losses of train/losses.py that are added; attention_layer: counted from 1, None is the last. teacher_cache: a folder for the
    teacher's teacher_top_k most likely tokens at every position (train/teacher_cache.py). blend_fraction: of the steps, after
    which all layers are ternary. dtype: of activations and products; None is the model's own.
    sub_norms: add norms before o_proj and down_proj.
    """

    COMMAND: ClassVar[str] = "qat"
    POSITIVE: ClassVar[Sequence[str]] = ("seq_length",)
    COURSE: ClassVar[Sequence[str]] = (
        "model", "teacher", "seq_length", "blend", "blend_fraction", "kl_weight", "temperature", "sub_norms", "hidden_weight",
        "hidden_loss", "attention_weight", "attention_layer",
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
    hidden_weight: float = 0.0
    hidden_loss: str = "cosine"
    attention_weight: float = 0.0
    attention_layer: int | None = None
    teacher_cache: Path | None = None
    teacher_top_k: int = 64
    dtype: str | None = None
    sub_norms: bool = False
    save_every: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers("qat", self, ("teacher_top_k",), ("temperature",))
        for name in ("hidden_weight", "attention_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"[qat] {flag(name)} is {getattr(self, name)}; 0 or more is allowed")
        if self.hidden_loss not in HIDDEN_LOSSES:
            raise ConfigError(f"[qat] --hidden-loss is {self.hidden_loss!r}; {', '.join(HIDDEN_LOSSES)} are allowed")
        if self.attention_layer is not None and self.attention_layer < 1:
            raise ConfigError(f"[qat] --attention-layer is {self.attention_layer}; layers are counted from 1")
        if self.teacher_cache is not None and (self.hidden_weight or self.attention_weight or not self.kl_weight):
            raise ConfigError(
                "[qat] --teacher-cache holds what --kl-weight compares, and nothing of the teacher's insides: give a "
                "--kl-weight above 0 and leave out --hidden-weight and --attention-weight, or leave out --teacher-cache"
            )
        for name in ("blend_fraction", "kl_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"[qat] {flag(name)} is {getattr(self, name)}; 0 to 1 is allowed")
        if self.blend not in SCHEDULES:
            raise ConfigError(f"[qat] --blend is {self.blend!r}; {', '.join(SCHEDULES)} are allowed")
        if self.dtype not in (None, *DTYPES):
            raise ConfigError(f"[qat] --dtype is {self.dtype}; {' and '.join(DTYPES)} are allowed")

    @property
    def taught_at(self) -> float | None:
        """The temperature of the teacher's logits that a step computes; None where it computes none."""
        return self.temperature if self.kl_weight and self.teacher_cache is None else None

    def course(self, ranks: int = 1) -> dict[str, Any]:
        return {**super().course(ranks), "teacher_top_k": self.teacher_top_k if self.teacher_cache else None}
