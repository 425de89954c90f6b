"""What a LoRA run is told. Names and defaults are mlx-lm's, where it has them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitnet_mlx.errors import ConfigError
from bitnet_mlx.train.checks import check_numbers
from bitnet_mlx.train.samples import LONG

_POSITIVE = (
    "iters", "batch_size", "rank", "max_seq_length", "grad_accumulation_steps", "steps_per_report", "steps_per_eval",
    "save_every", "test_batches",
)  # fmt: skip


@dataclass(frozen=True)
class LoraOptions:
    """One run. Field names are the command line's flags; num_layers None means 16, or all where there are fewer."""

    data: Path
    model: str | None = None
    adapter_path: Path = Path("adapters")
    train: bool = False
    test: bool = False
    fine_tune_type: str = "lora"
    iters: int = 1000
    batch_size: int = 4
    num_layers: int | None = None
    learning_rate: float = 1e-5
    warmup: int = 0
    grad_clip: float = 1.0
    rank: int = 8
    scale: float = 20.0
    dropout: float = 0.0
    keys: tuple[str, ...] | None = None
    mask_prompt: bool = False
    max_seq_length: int = 2048
    long_samples: str = "truncate"
    grad_accumulation_steps: int = 1
    steps_per_report: int = 10
    steps_per_eval: int = 200
    val_batches: int = 25
    test_batches: int = 500
    save_every: int = 100
    resume_adapter_file: Path | None = None
    resume: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers("lora", self, _POSITIVE, ("learning_rate", "grad_clip", "scale"))
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

    def course(self) -> dict[str, Any]:
        """The settings that decide every update, besides the adapter's and the data: a run goes on only under the same."""
        names = ("iters", "batch_size", "learning_rate", "warmup", "grad_clip", "grad_accumulation_steps", "seed")
        return {name: getattr(self, name) for name in names}
