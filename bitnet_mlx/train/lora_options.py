"""What a LoRA run is told. Names and defaults are mlx-lm's, where it has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from bitnet_mlx.errors import ConfigError
from bitnet_mlx.train.checks import check_numbers
from bitnet_mlx.train.loop_options import LoopOptions
from bitnet_mlx.train.samples import LONG


@dataclass(frozen=True, kw_only=True)
class LoraOptions(LoopOptions):
    """One run. Field names are the command line's flags; num_layers None means 16, or all where there are fewer."""

    COMMAND: ClassVar[str] = "lora"
    COURSE: ClassVar[Sequence[str]] = ("model", "pack")
    POSITIVE: ClassVar[Sequence[str]] = ("rank", "max_seq_length", "steps_per_eval", "test_batches")

    data: Path
    model: str | None = None
    adapter_path: Path = Path("adapters")
    train: bool = False
    test: bool = False
    fine_tune_type: str = "lora"
    batch_size: int = 4
    num_layers: int | None = None
    learning_rate: float = 1e-5
    rank: int = 8
    scale: float = 20.0
    dropout: float = 0.0
    keys: tuple[str, ...] | None = None
    mask_prompt: bool = False
    max_seq_length: int = 2048
    long_samples: str = "truncate"
    pack: bool = False
    steps_per_eval: int = 200
    val_batches: int = 25
    test_batches: int = 500
    resume_adapter_file: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers("lora", self, (), ("scale",))
        if self.max_seq_length < 2:
            raise ConfigError("[lora] --max-seq-length is 1; a token and the next one, 2, are the least")
        if self.long_samples not in LONG:
            raise ConfigError(f"[lora] --long-samples is {self.long_samples!r}; {' and '.join(LONG)} are allowed")
        if not (self.train or self.test):
            raise ConfigError("[lora] nothing to do; give --train, --test, or both")

    def layers(self, there: int) -> int:
        """How many of a model's last layers get an adapter. Raises ConfigError where it has fewer than asked for."""
        if self.num_layers is None or self.num_layers == -1:
            return there if self.num_layers == -1 else min(16, there)
        if not 1 <= self.num_layers <= there:
            raise ConfigError(
                f"[lora] --num-layers is {self.num_layers}; this model has {there} layers: 1 to {there}, or -1 for all"
            )
        return self.num_layers
