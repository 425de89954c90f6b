"""The model that a student learns from: its own float parent, or another of the same vocabulary."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from bitnet_mlx.checkpoint.hub import resolve
from bitnet_mlx.checkpoint.read import read_weights
from bitnet_mlx.errors import ConfigError
from bitnet_mlx.models.config import DecoderConfig
from bitnet_mlx.models.decoder_mlx import MlxModel, model_dtype
from bitnet_mlx.models.weights import DecoderWeights
from bitnet_mlx.nn.dense import DenseLinear
from bitnet_mlx.quality.texts import Text, check_same
from bitnet_mlx.tokenizer import Tokenizer, load_tokenizer
from bitnet_mlx.train.insides import Looker
from bitnet_mlx.train.losses import KEPT, Signal, log_softmax, looked_at
from bitnet_mlx.train.pieces import each, frozen
from bitnet_mlx.train.qat_options import QatOptions
from bitnet_mlx.train.teacher_cache import Kept, TeacherCache, weights_digest

log = logging.getLogger(__name__)
_EVERY = 10.0  # seconds between lines about a long preparation


def most_likely(logits: mx.array, k: int, temperature: float) -> tuple[mx.array, mx.array, mx.array]:
    """logits [..., V] -> what `kept_distance` takes: values float32 [..., K], indices uint32 [..., K], rest float32 [...]."""
    logs, vocab = log_softmax(logits.astype(mx.float32) / temperature), logits.shape[-1]
    if k == vocab:
        indices = mx.broadcast_to(mx.arange(vocab, dtype=mx.uint32), logits.shape)
        return logs, indices, mx.full(logits.shape[:-1], -mx.inf)
    indices = mx.argpartition(logs, vocab - k, axis=-1)[..., vocab - k :]
    rest = mx.logsumexp(mx.put_along_axis(logs, indices, mx.array(-mx.inf), axis=-1), axis=-1)
    return mx.take_along_axis(logs, indices, axis=-1), indices, rest


class Teacher:
    """What the losses are given of a teacher. It is read when it is first asked for something that no cache holds."""

    def __init__(
        self,
        load: Callable[[], MlxModel],
        options: QatOptions,
        looked: tuple[list[int], int | None],
        cache: TeacherCache | None,
    ) -> None:
        """looked: the layers whose insides are given, as Looker takes them."""
        self._load, self._options, self._looked, self.cache = load, options, looked, cache
        self._model: MlxModel | None = None
        self.loads = self.written = self.kept = (
            0  # times that it was read; windows written by this run, and needed by it
        )

    @property
    def model(self) -> MlxModel:
        """The teacher itself."""
        if self._model is None:
            self._model, self.loads = self._load(), self.loads + 1
        return self._model

    def release(self) -> None:
        """Let the teacher go, if a cache can stand for it."""
        if self.cache is not None and self._model is not None:
            self._model = None
            mx.clear_cache()

    def signal(self, inputs: np.ndarray) -> Signal:
        """int32 [B, L] -> "ready", what the teacher's head multiplies, [B, L, H], or from a cache "values", "indices" and "rest";
        "hidden" and "states", of the layers that losses look at; nothing where no loss asks for it.

        It is computed outside of the step that takes gradients, so that this one may be compiled.
        """
        if self.cache is not None:
            rows = [self.cache.read(ids) for ids in inputs]
            found = {i: row for i, row in enumerate(rows) if row is not None}
            found.update(self._keep(inputs, [i for i in range(len(inputs)) if i not in found]))
            stacked = [np.stack([getattr(found[i], name) for i in range(len(inputs))]) for name in KEPT]
            return {
                name: mx.array(x.astype(np.uint32) if name == "indices" else x)
                for name, x in zip(KEPT, stacked, strict=True)
            }
        options = self._options
        if not (options.kl_weight or options.hidden_weight or options.attention_weight):
            return {}
        insides = Looker(self.model, *self._looked)(mx.array(inputs))
        ready = {"ready": insides.ready} if options.kl_weight else {}
        return {**ready, "hidden": insides.hidden, "states": insides.states}

    def _keep(self, inputs: np.ndarray, missing: list[int]) -> dict[int, Kept]:
        """Compute and keep some windows of a batch; by their number in it."""
        cache = self.cache
        if cache is None or not missing:
            return {}
        rows, head = mx.array(inputs[missing]), frozen(self.model)

        def best(ready: mx.array) -> tuple[mx.array, ...]:
            return most_likely(head.product(ready), cache.k, self._options.temperature)

        found = each(best, head, Looker(self.model, [], None)(rows).ready.flatten(0, 1))
        values, indices, rest = (np.array(x.reshape(*rows.shape, *x.shape[1:])) for x in found)
        found = {i: Kept(*row) for i, *row in zip(missing, indices, values, rest, strict=True)}
        for i, kept in found.items():
            cache.write(inputs[i], kept)
        self.written += len(missing)
        return found

    def prepare(self, batches: Iterable[int], inputs: Callable[[int], np.ndarray]) -> None:
        """Have all windows of some batches on disk, and let the teacher go. inputs: int32 [B, L] of a batch, by its number.

        Raises MemoryLimitError where the disk has no room for them, TrainError where it takes no more.
        """
        cache = self.cache
        if cache is None:
            return
        numbers, waiting, length = list(batches), [], 1
        for number in numbers:
            rows = inputs(number)
            missing = [i for i, ids in enumerate(rows) if not cache.has(ids)]
            waiting += [(number, missing)] if missing else []
            self.kept, length = self.kept + len(rows), rows.shape[1]
        cache.check_room(sum(len(missing) for _, missing in waiting), length)
        cache.describe()
        told = time.monotonic()
        for done, (number, missing) in enumerate(waiting, 1):
            rows = inputs(number)
            self._keep(rows, [i for i in missing if not cache.has(rows[i])])  # the same window may have come before
            if time.monotonic() - told > _EVERY or done == len(waiting):
                log.info("teacher: %d of %d batches kept in %s", done, len(waiting), cache.folder)
                told = time.monotonic()
        self.release()

    def record(self) -> dict[str, Any]:
        """About the cache, for the command's record; {} without one. windows: that this run needed, equal ones counted each.
        files, bytes: that are there."""
        if self.cache is None:
            return {}
        files, nbytes = self.cache.size()
        about = {"folder": str(self.cache.folder), "files": files, "bytes": nbytes, "windows": self.kept}
        return {"teacher_cache": {**about, "written": self.written, "teacher_loads": self.loads}}


def read_teacher(
    options: QatOptions, folder: Path, weights: DecoderWeights, tokenizer: Tokenizer, texts: list[Text]
) -> Teacher:
    """The model of options.teacher; None is the float model itself, `weights` of `folder`.

    texts: what both tokenizers must read alike. Raises ConfigError where the teacher's tokens are not the student's, or its
    layers are of another width and compared.
    """
    theirs, path = weights, folder
    if options.teacher is not None:
        path = resolve(options.teacher)
        theirs = read_weights(path)
        _check(options, weights.config, theirs.config)
        for text in texts:
            check_same(tokenizer, load_tokenizer(path), text)
    cache = None
    if options.teacher_cache is not None:
        about = {
            "weights": weights_digest(path), "dtype": model_dtype(theirs.config, options.dtype),
            "device": str(mx.default_device().type), "temperature": options.temperature,
        }  # fmt: skip
        vocab = theirs.config.vocab_size
        cache = TeacherCache(options.teacher_cache, about, min(options.teacher_top_k, vocab), vocab)
    looked = looked_at(options, weights.config.num_hidden_layers, theirs.config.num_hidden_layers)
    return Teacher(lambda: narrowed(MlxModel(theirs, options.dtype)), options, looked, cache)


def narrowed(model: MlxModel) -> MlxModel:
    """The model, whose float32 weights are in the dtype of its activations: so are its products then, and a student's."""
    for _, module in model.named_modules():
        if isinstance(module, DenseLinear) and module.weight.dtype == mx.float32:
            module.weight = module.weight.astype(getattr(mx, model.dtype))
            mx.eval(module.weight)
    return model


def _check(options: QatOptions, own: DecoderConfig, theirs: DecoderConfig) -> None:
    if theirs.vocab_size != own.vocab_size:
        raise ConfigError(
            f"[qat] the teacher knows {theirs.vocab_size} tokens, the model {own.vocab_size}; a teacher of the same "
            "vocabulary is needed"
        )
    if options.hidden_weight and theirs.hidden_size != own.hidden_size:
        raise ConfigError(
            f"[qat] --hidden-weight compares hidden states: the teacher's are {theirs.hidden_size} wide, the model's "
            f"{own.hidden_size}. Give a teacher of the same width, or --attention-weight, whose relations have none"
        )
