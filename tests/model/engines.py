"""The engines that tests of whole models run over."""

from __future__ import annotations

from typing import Any

from bitnet_mlx.models.weights import DecoderWeights

EXACT = ("numpy",)  # equal to each other to the last bit
ENGINES = (*EXACT,)


def build(name: str, weights: DecoderWeights) -> Any:
    """A decoder by its engine's name."""
    from bitnet_mlx.models.decoder_numpy import NumpyDecoder

    return {"numpy": NumpyDecoder}[name](weights)
