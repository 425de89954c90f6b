"""The same engine over MLX: texts join and leave one batch, begin with kept positions, and say what they would say alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitnet_mlx.generation import SamplingConfig, stream_generate
from bitnet_mlx.models.decoder_mlx import MlxModel
from bitnet_mlx.models.demand import kv_of
from bitnet_mlx.serve.engine import Engine, Limits
from bitnet_mlx.serve.work import Task
from tests.serve.running import model, until

TIE = 1e-3  # log probabilities nearer than this may change places


@pytest.mark.parametrize("prefix_bytes", [0, 1 << 22])
def test_a_batch_says_what_single_runs_say(prefix_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, tokenizer = model(tmp_path)
    decoder = MlxModel(small.weights)
    sizes: list[int] = []
    step = decoder.step
    monkeypatch.setattr(MlxModel, "step", lambda _, tokens, *rest: sizes.append(len(tokens)) or step(tokens, *rest))
    rng = np.random.default_rng(3)
    stem = rng.integers(4, 400, 70).tolist()
    jobs = [([*stem[: int(rng.integers(1, 71))], *rng.integers(4, 400, 5).tolist()], 4 + i % 5) for i in range(12)]
    engine = Engine(decoder, tokenizer, Limits(running=4, step_tokens=48, prefix_bytes=prefix_bytes))
    told: list[list[Any]] = [[] for _ in jobs]
    works = []
    for (ids, count), here in zip(jobs, told, strict=True):
        task = Task(ids, count, SamplingConfig(), top=2)
        works += engine.submit([task], lambda _, piece, here=here: here.append(piece))
    engine.start()
    until(lambda: engine.counts.finished == len(jobs), "all end")
    engine.stop()
    assert max(sizes) == 4 and engine.counts.kv_bytes == 0
    assert bool(sum(work.cached for work in works)) == bool(prefix_bytes)
    assert engine.counts.prefix_bytes <= prefix_bytes
    monkeypatch.undo()
    for (ids, count), pieces in zip(jobs, told, strict=True):
        alone = [r.token for r in stream_generate(decoder, tokenizer, ids, count)]
        for piece, want in zip(pieces, alone, strict=True):
            if piece.token != want:
                (_, first), (_, second) = piece.top
                assert first - second < TIE
                break


def test_the_size_of_a_cache_is_foreseen() -> None:
    """What the engine counts a text as, and what its cache then holds."""
    from tests.support.random_model import random_weights, tiny_config

    decoder = MlxModel(random_weights(tiny_config(head_dim=32, max_position_embeddings=600), seed=1))
    for bits in (None, 8):
        decoder.kv_bits = bits
        for positions in (1, 100, 300, 600):
            cache = decoder.make_cache(positions)
            decoder.step([[1] * positions], [cache])
            assert 0 < cache.nbytes <= kv_of(decoder)(positions, 1)
            if positions == 600:
                assert cache.nbytes == kv_of(decoder)(600, 1)
