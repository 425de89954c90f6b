"""What a calibration is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitnet_mlx.calibration.clips import PERCENTILE, check_percentile
from bitnet_mlx.errors import ConfigError


@dataclass(frozen=True)
class CalibrateOptions:
    """data: text files. samples: stretches of text that are run, of `length` tokens each (0: 512, or the context).

    ranges_only: no runs that measure the loss with clips and of layers by themselves. load: keyword arguments of
    bitnet_mlx.load besides the model.
    """

    data: tuple[Path, ...]
    load: dict[str, Any]
    model: str | None = None
    samples: int = 16
    length: int = 0
    percentile: float = PERCENTILE
    ranges_only: bool = False
    output: Path = Path("calibration.json")

    def __post_init__(self) -> None:
        if self.samples < 1 or self.length < 0 or self.length == 1:
            raise ConfigError(
                f"[calibrate] --samples {self.samples}, --length {self.length}; at least 1, and at least 2, are allowed"
            )
        check_percentile(self.percentile)
        if not self.output.absolute().parent.is_dir():
            raise ConfigError(f"[calibrate] --output is {self.output}; its folder must be there: make it")
        if self.output.exists() and not self.output.is_file():  # renaming would put a file in the place of /dev/null
            raise ConfigError(f"[calibrate] --output is {self.output}, a folder or a device; give a name for a file")
        for name in ("adapter_path", "kv_bits", "precision"):
            if self.load.get(name):
                raise ConfigError(f"[calibrate] looks at a model as it is; leave out --{name.replace('_', '-')}")
