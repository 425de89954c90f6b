"""load, generate and stream_generate: the package as a notebook sees it."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitnet_mlx.errors import ConfigError

if TYPE_CHECKING:
    from bitnet_mlx.generate.stream import GenerationResponse
    from bitnet_mlx.models.weights import DecoderWeights
    from bitnet_mlx.tokenizer import Tokenizer


def embedded_model() -> Path:
    """The folder of the model that comes with the package."""
    return Path(str(files("bitnet_mlx") / "assets" / "tiny"))
