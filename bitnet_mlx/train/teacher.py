"""The model that a student learns from: its own float parent, or another of the same vocabulary."""

from __future__ import annotations

from bitnet_mlx.checkpoint.hub import resolve
from bitnet_mlx.checkpoint.read import read_weights
from bitnet_mlx.errors import ConfigError
from bitnet_mlx.models.decoder_mlx import MlxModel
from bitnet_mlx.models.weights import DecoderWeights
from bitnet_mlx.quality.texts import Text, check_same
from bitnet_mlx.tokenizer import Tokenizer, load_tokenizer


def read_teacher(name: str | None, weights: DecoderWeights, tokenizer: Tokenizer, texts: list[Text]) -> MlxModel:
    """The model called `name`; None is the float model itself. Raises ConfigError where its tokens are not the student's."""
    if name is None:
        return MlxModel(weights)
    folder = resolve(name)
    theirs = read_weights(folder)
    if theirs.config.vocab_size != weights.config.vocab_size:
        raise ConfigError(
            f"[qat] the teacher knows {theirs.config.vocab_size} tokens, the model {weights.config.vocab_size}; a teacher "
            "of the same vocabulary is needed"
        )
    for text in texts:
        check_same(tokenizer, load_tokenizer(folder), text)
    return MlxModel(theirs)
