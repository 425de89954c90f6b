"""What a fusion is told. Names and defaults are mlx-lm's, where it has them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitnet_mlx.calibration.least_squares import check_granularity
from bitnet_mlx.errors import ConfigError

METHODS = ("absmean", "least-squares", "gptq")
NATIVE = ("words2", "trits5")


@dataclass(frozen=True, kw_only=True)
class FuseOptions:
    """Field names are the command line's flags.

    method: how the sum of weight and adapter becomes ternary; None is gptq with a calibration text, else least-squares.
    scales: per tensor, row or group (of 128 columns); None is the base's own. dequantize: write floats instead. data:
    texts to measure on; without them the end of the calibration text is held out for that. length, limit: of windows
    and of a text, in tokens; length 0 is 512 or the context. load: more of what read_weights takes (revision,
    i2s_layout, ternarize). backend, threads: what measures.
    """

    model: str | None = None
    adapter_path: Path = Path("adapters")
    save_path: Path = Path("fused_model")
    dequantize: bool = False
    format: str | None = None
    method: str | None = None
    scales: str | None = None
    calibration_data: Path | None = None
    calibration_samples: int = 16
    data: tuple[Path, ...] = ()
    length: int = 0
    limit: int | None = None
    head_bits: int | None = None
    dtype: str | None = None
    force: bool = False
    backend: str = "auto"
    threads: int | None = None
    load: dict[str, Any]

    def __post_init__(self) -> None:
        given = [f"--{name}" for name in ("method", "scales", "format") if getattr(self, name) is not None]
        if self.dequantize and (given or self.calibration_data is not None):
            raise ConfigError(
                f"[fuse] --dequantize writes floats, for which {', '.join(given) or '--calibration-data'} has no meaning; "
                "leave it out"
            )
        if self.method is not None and self.method not in METHODS:
            raise ConfigError(f"[fuse] --method is {self.method!r}; {', '.join(METHODS)} are allowed")
        if self.scales is not None:
            check_granularity(self.scales)
        if self.method == "absmean" and self.scales not in (None, "tensor"):
            raise ConfigError("[fuse] absmean has one scale a tensor; give --method least-squares")
        if self.method == "gptq" and self.calibration_data is None:
            raise ConfigError("[fuse] gptq fits weights to what a text makes of them; give --calibration-data FILE")
        if self.chosen != "gptq" and self.calibration_data is not None:
            raise ConfigError(
                f"[fuse] {self.method} fits to no text; leave out --calibration-data, or give --method gptq"
            )
        for name, least in (("length", 0), ("limit", 1), ("calibration_samples", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                flag = name.replace("_", "-")
                raise ConfigError(f"[fuse] --{flag} is {value}; {max(least, 1)} or more is allowed")

    @property
    def chosen(self) -> str:
        """The method."""
        return self.method or ("least-squares" if self.calibration_data is None else "gptq")

    @property
    def target(self) -> str:
        """The format that is written, a name of checkpoint.convert."""
        return "hf-float" if self.dequantize else self.format or "words2"
