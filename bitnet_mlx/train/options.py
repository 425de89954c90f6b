"""What a training run is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from bitnet_mlx.errors import ConfigError
from bitnet_mlx.models.config import DecoderConfig, RopeConfig
from bitnet_mlx.train.checks import flag
from bitnet_mlx.train.loop_options import DTYPES
from bitnet_mlx.train.ste_options import SteOptions


@dataclass(frozen=True, kw_only=True)
class TrainOptions(SteOptions):
    """One run. Field names are the command line's flags."""

    POSITIVE: ClassVar[Sequence[str]] = ("seq_length", "hidden_size", "num_layers", "num_heads")
    COURSE: ClassVar[Sequence[str]] = ("seq_length", "quantise", "dtype")

    data: tuple[Path, ...]
    output: Path
    model: Path | None = None
    eval_data: tuple[Path, ...] = ()
    eval_fraction: float = 0.0
    batch_size: int = 16
    seq_length: int = 256
    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.1
    vocab_size: int = 2048
    hidden_size: int = 256
    intermediate_size: int = 0
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 0
    quantise: bool = True
    dtype: str = "bfloat16"
    save_every: int = 500
    steps_per_report: int = 20
    teacher: Path | None = None
    kl_weight: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("intermediate_size", "num_kv_heads"):  # 0 lets the others decide
            if getattr(self, name) < 0:
                raise ConfigError(f"[train] {flag(name)} is {getattr(self, name)}; 1 or more is allowed")
        if not 0 <= self.eval_fraction < 1:
            raise ConfigError(f"[train] --eval-fraction is {self.eval_fraction}; 0 to 1 is allowed, 1 not included")
        if not 0 <= self.kl_weight <= 1 or not self.temperature > 0:
            raise ConfigError(
                f"[train] --kl-weight {self.kl_weight} and --temperature {self.temperature}: the first must lie in 0 to 1, "
                "the second be above 0"
            )
        if not self.quantise and self.ste != "standard":
            raise ConfigError(f"[train] --ste is {self.ste}, and --float rounds nothing; give one of the two")
        if self.dtype not in DTYPES:
            raise ConfigError(f"[train] --dtype is {self.dtype}; {' and '.join(DTYPES)} are allowed")

    def model_config(self, vocab_size: int) -> DecoderConfig:
        """The shape of a new model. An intermediate size of 0 means 8/3 of the hidden size, up to a multiple of 128;
        0 key-value heads mean as many as query heads. Raises ConfigError where the heads do not divide."""
        kv = self.num_kv_heads or self.num_heads
        if self.hidden_size % (2 * self.num_heads) or self.num_heads % kv:
            raise ConfigError(
                f"[train] hidden size {self.hidden_size}, {self.num_heads} heads, {kv} key-value heads; the hidden size "
                "must be a multiple of twice the heads, and the heads a multiple of the key-value heads"
            )
        return DecoderConfig(
            model_type="bitnet",
            vocab_size=vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size or -(-8 * self.hidden_size // 384) * 128,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=kv,
            head_dim=self.hidden_size // self.num_heads,
            max_position_embeddings=self.seq_length,
            hidden_act="relu2",
            sub_norms=True,
            tie_word_embeddings=True,
            rope=RopeConfig(rope_theta=10000.0),
            dtype="float32",
            eos_token_ids=(0,),
            pad_token_id=0,
        )

    @property
    def taught_at(self) -> float | None:
        """The temperature of the teacher's logits that a step computes; None where it computes none."""
        return self.temperature if self.teacher and self.kl_weight else None

    def course(self, ranks: int = 1) -> dict[str, Any]:
        taught = {"kl_weight": self.kl_weight, "temperature": self.temperature} if self.teacher else {}
        return {**super().course(ranks), "teacher": str(self.teacher) if self.teacher else None, **taught}
