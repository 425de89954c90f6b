"""POST /v1/embeddings: a text that is only read, and what its hidden states come to."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitnet_mlx.generation.sampling import SamplingConfig
from bitnet_mlx.serve.failures import ApiError
from bitnet_mlx.serve.jobs import Model
from bitnet_mlx.serve.pooling import PoolingKind
from bitnet_mlx.serve.schema import EmbeddingBody
from bitnet_mlx.serve.work import Event, Listener, Task, Vector, Want, Work
from bitnet_mlx.tokenizer import Tokenizer


@dataclass(frozen=True)
class Read(Task):
    """A text that is fed whole, and pooled."""

    kind: PoolingKind = "mean"

    def begin(self, index: int, tokenizer: Tokenizer, stop_ids: frozenset[int], listener: Listener) -> Work:
        """As Task.begin."""
        return Reading(self, index, tokenizer, stop_ids, listener)


class Reading(Work):
    """The work of a Read: its rows are summed up, or the last one kept, as they come."""

    want: Want = "hidden"  # type: ignore[assignment]
    _sum: np.ndarray | float = 0.0

    def take(self, rows: np.ndarray) -> list[Event]:
        """Hidden states float32 [length, hidden] of the tokens just fed."""
        assert isinstance(self.task, Read)
        mean = self.task.kind == "mean"
        self._sum = self._sum + rows.sum(axis=0, dtype=np.float64) if mean else rows[-1]
        if self.waiting:
            return []
        return [Vector(np.asarray(self._sum / len(self.task.ids) if mean else self._sum, np.float32))]


class Embeddings:
    """A request's texts, and its answer once `add` has been told of each."""

    def __init__(self, model: Model, body: EmbeddingBody) -> None:
        """Raises ApiError: 400 for a model without embeddings, or for what it cannot be fed."""
        model.check_name(body.model)
        if model.pooling is None:
            raise ApiError(
                400, f"{model.name} makes no embeddings: its files name no pooling that is supported (mean, last token); "
                "start the server with --pooling mean or last to have those of its last layer", param="model",
                code="no_embeddings",
            )  # fmt: skip
        most = model.decoder.config.hidden_size
        if body.dimensions is not None and body.dimensions > most:
            raise ApiError(
                400,
                f"dimensions is {body.dimensions}; 1 to {most} are allowed",
                param="dimensions",
                code="invalid_value",
            )
        self._body, self._pooling = body, model.pooling
        self._vectors: dict[int, np.ndarray] = {}
        self.tasks: list[Task] = []
        for text in body.input:
            ids = model.tokenizer.encode(text) if isinstance(text, str) else text
            model.check_ids(ids, "input")
            self.tasks.append(Read(ids, 0, SamplingConfig(), kind=model.pooling.kind))

    def add(self, index: int, vector: Vector) -> None:
        """What the text of this number has come to."""
        self._vectors[index] = vector.values

    def answer(self) -> dict[str, Any]:
        """The answer's JSON."""
        data = [
            {"object": "embedding", "index": index, "embedding": self._shown(vector)}
            for index, vector in sorted(self._vectors.items())
        ]
        tokens = sum(len(task.ids) for task in self.tasks)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": data, "model": self._body.model, "usage": usage}

    def _shown(self, vector: np.ndarray) -> str | list[float]:
        """The vector as it was asked for: base64 is of little-endian float32."""
        x = vector[: self._body.dimensions].astype(np.float64)
        if self._pooling.normalize:
            x = x / max(float(np.linalg.norm(x)), 1e-12)
        values = x.astype("<f4")
        return (
            base64.b64encode(values.tobytes()).decode() if self._body.encoding_format == "base64" else values.tolist()
        )
