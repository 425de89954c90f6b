"""What a run from float to ternary works on, read and checked before its first step; and what is measured on it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from bitnet_mlx.checkpoint.hub import resolve
from bitnet_mlx.checkpoint.read import read_weights
from bitnet_mlx.errors import ConfigError
from bitnet_mlx.models.decoder_mlx import MlxModel
from bitnet_mlx.models.weights import DecoderWeights
from bitnet_mlx.quality.score import Score, score
from bitnet_mlx.quality.texts import Text, read_text
from bitnet_mlx.tokenizer import Tokenizer, load_tokenizer
from bitnet_mlx.train.corpus import find_files, read_corpus
from bitnet_mlx.train.data import Windows
from bitnet_mlx.train.masters import make_student, set_blend
from bitnet_mlx.train.qat_options import QatOptions
from bitnet_mlx.train.sub_norms import settle, with_sub_norms
from bitnet_mlx.train.teacher import Teacher, read_teacher


@dataclass(frozen=True)
class Run:
    """folder: of the float model. weights: its own, with the sub-norms that were added. ids: int32 [tokens] of the training
    text. texts: held-out ones."""

    options: QatOptions
    folder: Path
    weights: DecoderWeights
    student: MlxModel
    teacher: Teacher
    ids: np.ndarray
    texts: list[Text]

    @property
    def windows(self) -> Windows:
        """Which of `ids` belong to a batch. Raises ConfigError where there are fewer than one window's."""
        return Windows(len(self.ids), self.options.seq_length, self.options.batch_size, self.options.seed)

    def batch(self, index: int) -> np.ndarray:
        """int32 [B, L + 1]: batch `index` of the run."""
        return self.ids[self.windows.starts(index)[:, None] + np.arange(self.options.seq_length + 1)]

    def course(self, ranks: int) -> dict[str, Any]:
        """What must be equal for a run to go on exactly."""
        data = hashlib.sha256(self.ids.tobytes()).hexdigest()
        return {**self.options.course(ranks), "dtype": self.student.dtype, "data": data}

    def measured(self, name: str, blend: float) -> dict[str, Any]:
        """Held-out figures of the student with every layer at one blend; {} without held-out text."""
        if not self.texts:
            return {}
        self.student.eval()
        set_blend(self.student.layers, [blend] * len(self.student.layers))
        length = self.options.seq_length
        total = Score(0, 0, 0.0, 0.0, 0.0, 0)
        for text in self.texts:
            total = total + score(self.student, text.ids, text.nbytes, length, max(1, length // 2), self.teacher.model)
        return {name: total.record()}


def prepare(options: QatOptions) -> Run:
    """Read models and text. Raises ConfigError or FormatError."""
    folder = resolve(options.model)
    if not folder.is_dir():
        raise ConfigError(f"[qat] {folder} is a file; a Hugging Face folder of float weights is needed")
    tokenizer, weights = load_tokenizer(folder), read_weights(folder)
    if options.seq_length > weights.config.max_position_embeddings:
        raise ConfigError(
            f"[qat] --seq-length is {options.seq_length}; the model's context holds {weights.config.max_position_embeddings}"
        )
    own = with_sub_norms(weights) if options.sub_norms else weights
    student = make_student(own, options.dtype, options.estimator, options.sub_norms)
    texts = [read_text(path, tokenizer) for path in options.eval_data]
    ids = _ids(tokenizer, options)
    shown = [Text("--data", np.unique(ids).tolist(), 0), *texts]
    teacher = read_teacher(options, folder, weights, tokenizer, shown)
    if options.sub_norms:
        settle(student, _first(ids, options))
    return Run(options, folder, own, student, teacher, ids, texts)


def _first(ids: np.ndarray, options: QatOptions) -> mx.array:
    """The first batch's worth of the text, [B, L], or all of it where it is shorter."""
    length = min(options.seq_length, len(ids))
    rows = min(options.batch_size, len(ids) // length)
    return mx.array(ids[: rows * length].reshape(rows, length))


def _ids(tokenizer: Tokenizer, options: QatOptions) -> np.ndarray:
    corpus = read_corpus(find_files(options.data))
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return np.asarray([i for document in corpus.documents for i in [*tokenizer.encode(document.text), *end]], np.int32)
