"""The model that a student learns from: its own float parent, or another of the same vocabulary."""

from __future__ import annotations

import mlx.core as mx

from bitnet_mlx.checkpoint.hub import resolve
from bitnet_mlx.checkpoint.read import read_weights
from bitnet_mlx.errors import ConfigError
from bitnet_mlx.models.decoder_mlx import MlxModel
from bitnet_mlx.models.weights import DecoderWeights
from bitnet_mlx.quality.texts import Text, check_same
from bitnet_mlx.tokenizer import Tokenizer, load_tokenizer
from bitnet_mlx.train.optimizer import Tensors
from bitnet_mlx.train.qat_options import QatOptions


class Teacher:
    """What the losses are given of a teacher."""

    def __init__(self, model: MlxModel, options: QatOptions) -> None:
        self.model, self._options = model, options

    def signal(self, inputs: mx.array) -> Tensors:
        """int32 [B, L] -> "logits" [B, L, V], or nothing where no loss asks for it.

        It is computed outside of the step that takes gradients, so that this one may be compiled.
        """
        return {"logits": self.model(inputs)} if self._options.kl_weight else {}


def read_teacher(options: QatOptions, weights: DecoderWeights, tokenizer: Tokenizer, texts: list[Text]) -> Teacher:
    """The model of options.teacher; None is the float model itself.

    texts: what both tokenizers must read alike. Raises ConfigError where the teacher's tokens are not the student's.
    """
    if options.teacher is None:
        return Teacher(MlxModel(weights, options.dtype), options)
    folder = resolve(options.teacher)
    theirs = read_weights(folder)
    if theirs.config.vocab_size != weights.config.vocab_size:
        raise ConfigError(
            f"[qat] the teacher knows {theirs.config.vocab_size} tokens, the model {weights.config.vocab_size}; a teacher "
            "of the same vocabulary is needed"
        )
    for text in texts:
        check_same(tokenizer, load_tokenizer(folder), text)
    return Teacher(MlxModel(theirs, options.dtype), options)
