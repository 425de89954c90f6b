"""Sequences of different lengths in one pass on MLX: each gets what it would get alone, and joins and leaves at will."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from bitnet_mlx.errors import ConfigError, MemoryLimitError
from bitnet_mlx.models import decoder_mlx
from bitnet_mlx.models.decoder_mlx import MlxModel
from bitnet_mlx.models.decoder_numpy import NumpyDecoder
from bitnet_mlx.models.parts import passes
from bitnet_mlx.models.ragged_mlx import padded_rows
from tests.mlx_engine.test_mlx_decoder import CASES, build, ids
from tests.mlx_engine.test_mlx_token import Whole
from tests.support.random_model import random_weights, tiny_config

TEXTS = [ids(1, 23), ids(2, 40), ids(3, 11), ids(4, 30)]
# How many tokens of each text a step takes: prompts of many lengths, single tokens, texts that come late and leave early.
STEPS = [(9, 0, 1, 5), (1, 13, 1, 0), (1, 20, 1, 1), (1, 1, 0, 1), (11, 1, 8, 0), (0, 5, 0, 23)]


def run(model: Any, steps: list[tuple[int, ...]] = STEPS) -> list[np.ndarray]:
    """Logits after every token of each text, fed in these steps."""
    caches = [model.make_cache() for _ in TEXTS]
    found: list[list[np.ndarray]] = [[] for _ in TEXTS]
    for step in steps:
        now = [i for i, count in enumerate(step) if count]
        tokens = [TEXTS[i][caches[i].offset : caches[i].offset + step[i]] for i in now]
        for i, y in zip(now, model.step(tokens, [caches[i] for i in now], "all"), strict=True):
            found[i].append(y)
    return [np.concatenate(parts) for parts in found]


@pytest.mark.parametrize("case", CASES)
def test_each_gets_what_it_gets_alone_and_what_the_reference_says(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = build(case)
    model, reference = MlxModel(weights), NumpyDecoder(weights)
    together = run(model)
    monkeypatch.setattr(decoder_mlx, "PIECE", 7)
    pieces = run(model)
    near = []
    for i, text in enumerate(TEXTS):
        alone = model.step([text], [model.make_cache()], "all")[0]
        assert together[i].shape == pieces[i].shape == alone.shape
        assert np.abs(together[i] - alone).max() < 1e-4 and np.abs(pieces[i] - alone).max() < 1e-4
        expected = reference.step([text], [reference.make_cache()], "all")[0]
        near.append((np.abs(together[i] - expected).max(axis=1) < 1e-4).mean())
    assert np.mean(near) > 0.5  # from a flipped code on nothing is promised (test_mlx_decoder.py counts them)


def test_the_last_logits_alone() -> None:
    model = MlxModel(build("bitnet"))
    every = model.step(TEXTS, [model.make_cache() for _ in TEXTS], "all")
    last = model.step(TEXTS, [model.make_cache() for _ in TEXTS])
    assert all(y.shape == (67,) and np.abs(y - e[-1]).max() < 1e-4 for y, e in zip(last, every, strict=True))


@pytest.mark.parametrize("kv_bits", [16, 8])
def test_small_caches(kv_bits: int) -> None:
    model = MlxModel(random_weights(tiny_config(head_dim=32), seed=2))
    model.kv_bits = kv_bits
    caches = [model.make_cache() for _ in TEXTS]
    together = model.step(TEXTS, caches)
    alone = [model.step([text], [model.make_cache()])[0] for text in TEXTS]
    assert all(np.abs(a - b).max() < 1e-3 * np.ptp(b) for a, b in zip(together, alone, strict=True))
    other = model.make_cache()
    other.extend([caches[1].copy(0, 32), caches[1].copy(32, 39)])
    again = model.step([TEXTS[1][39:]], [other])[0]
    assert other.offset == 40 and np.abs(again - together[1]).max() < 1e-3 * np.ptp(again)


def test_passes_that_are_compiled_are_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As over our kernels on a GPU, where a single sequence takes a token's own graph in between."""
    mx.disable_compile()  # the traced functions run as they are: MLX's CPU device would call a C++ compiler
    try:
        weights = build("bitnet, row scales, 8-bit head")
        model, plain, sizes = MlxModel(weights, ops=Whole()), MlxModel(weights), []
        backbone = model.model.__call__.__func__
        monkeypatch.setattr(
            type(model.model),
            "__call__",
            lambda self, x, *args, **more: sizes.append(x.size) or backbone(self, x, *args, **more),
        )
        steps = [(9, 0, 1, 0), (1, 0, 1, 0), (1, 0, 0, 0), (1, 0, 0, 0), (1, 4, 1, 9)]
        together = run(model, steps)
        assert sizes == [12, 2, 1, 1, 16]
        for a, b in zip(together, run(plain, steps), strict=True):
            assert np.abs(a - b).max() < 1e-4
    finally:
        mx.enable_compile()


def test_nothing_moves_where_something_is_refused() -> None:
    model = MlxModel(build("bitnet"))
    caches = [model.make_cache(30), model.make_cache(20)]
    with pytest.raises(MemoryLimitError, match="21 positions are needed and 20 are allowed"):
        model.step([ids(0, 5), ids(0, 21)], caches)
    with pytest.raises(ConfigError, match="no tokens"):
        model.step([ids(0, 5), []], caches)
    assert [c.offset for c in caches] == [0, 0]


def test_how_tokens_are_cut_into_passes() -> None:
    cut = [
        [(p.sequence, list(p.ids), p.at, p.last) for p in parts]
        for parts in passes([[1, 2, 3], [4], [5, 6, 7, 8, 9]], 4)
    ]
    assert cut == [
        [(0, [1, 2, 3], 0, True), (1, [4], 3, True)],
        [(2, [5, 6, 7, 8], 0, False)],
        [(2, [9], 0, True)],
    ]
    sizes = [padded_rows(n) for n in range(1, 513)]
    assert sizes[:8] == [*range(1, 9)] and len(set(sizes)) < 22
    assert all(n <= size <= n * 1.5 for n, size in enumerate(sizes, 1))
