"""The engines against each other on random models: equal bits where every sum's order is fixed, else equal codes."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from bitnet_mlx.backends import numpy_ref as ref
from bitnet_mlx.models.config import RopeConfig
from bitnet_mlx.models.decoder_cpu import CpuDecoder
from bitnet_mlx.models.decoder_mlx import MlxModel
from bitnet_mlx.models.decoder_numpy import NumpyDecoder
from bitnet_mlx.models.weights import DecoderWeights
from bitnet_mlx.quality.agreement import Trace, compare, record
from tests.model.engines import ENGINES, EXACT, build
from tests.support.random_model import random_weights, tiny_config

LLAMA: dict[str, Any] = dict(model_type="llama", hidden_act="silu", sub_norms=False, tie_word_embeddings=False)
WIDE: dict[str, Any] = dict(
    hidden_size=260, intermediate_size=390, num_attention_heads=5, num_key_value_heads=1, head_dim=52
)
LLAMA3 = RopeConfig(rope_theta=5e5, rope_type="llama3", factor=8.0, original_max_position_embeddings=32)
YARN = RopeConfig(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
ALL = tuple(tiny_config().linear_shapes())
# What each case changes in the config, and in the weights.
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tensor scales, tied bfloat16 head": ({}, {}),
    "row scales, 8-bit head": ({}, dict(scale="row", head="8")),
    "group scales, 6-bit head, wide": (WIDE, dict(scale="group", head="6")),
    "group scales, biases, untied 4-bit head": ({**LLAMA, **WIDE}, dict(scale="group", head="4", bias=True)),
    "row scales, biases, untied float32 head": (LLAMA, dict(scale="row", head="float32", bias=True)),
    "dense linears": ({}, dict(head="float32", dense=("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"))),
    "dense attention input, llama": (LLAMA, dict(dense=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))),
    "no grouped heads, llama3 rope": (dict(LLAMA, num_key_value_heads=4, rope=LLAMA3), dict(head="float32")),
    "one layer, yarn rope": (dict(num_hidden_layers=1, rope=YARN), dict(head="8")),
    "norms of heads, ternary head": (
        dict(LLAMA, model_type="qwen3", qk_norms=True),
        dict(scale="group", head="ternary"),
    ),
    "norms in all linears": (LLAMA, dict(normed=ALL, scale="row", head="float32")),
    "norms in some linears, sub-norms, biases, dense": (
        dict(WIDE, qk_norms=True),
        dict(normed=ALL[1:3] + ALL[4:5] + ALL[6:], dense=ALL[2:3] + ALL[5:6], bias=True, scale="group"),
    ),
}
LENGTH = 40
# Measured on x86 between numpy and MLX: logits within 1e-5 of their standard deviation (8 to 16), and over the 27
# models (each of MODELS with three seeds, 12,640 to 93,600 codes) two flips of their own, of one code each.
TOLERANCE = 2e-5
FLIPS = 2  # for each model; elsewhere other codes lie on a boundary


@cache
def weights(model: str, seed: int = 0) -> DecoderWeights:
    config, changes = MODELS[model]
    return random_weights(tiny_config(**config), seed, **changes)


def tokens(seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng((seed, 1)).integers(0, 67, LENGTH)]


@cache
def reference(model: str, seed: int = 0) -> Trace:
    return record(build("numpy", weights(model, seed)), tokens(seed))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("engine", EXACT)
@pytest.mark.parametrize("chunk", [1, 3, 17, LENGTH])
def test_exact_engines_give_the_same_bits_for_any_chunking(model: str, engine: str, chunk: int) -> None:
    found = record(build(engine, weights(model)), tokens(), chunk)
    np.testing.assert_array_equal(found.logits, reference(model).logits)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("engine", EXACT)
def test_exact_engines_give_the_same_bits_in_a_batch(model: str, engine: str) -> None:
    """Three sequences of different lengths in one pass, after prefixes of different lengths."""
    decoder = build(engine, weights(model))
    caches = [decoder.make_cache() for _ in range(3)]
    ids, expected = tokens(), reference(model).logits
    decoder.step([ids[:5], ids[:11], ids[:1]], caches, "all")
    for found, (start, end) in zip(
        decoder.step([ids[5:6], ids[11:30], ids[1:9]], caches, "all"), [(5, 6), (11, 30), (1, 9)], strict=True
    ):
        np.testing.assert_array_equal(found, expected[start:end])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("engine", [name for name in ENGINES if name not in EXACT])
def test_others_agree_wherever_no_flip_reaches(model: str, engine: str) -> None:
    for seed in range(3):
        expected = reference(model, seed)
        spread = float(expected.logits.std())
        for chunk in (None, 7):
            result = compare(expected, record(build(engine, weights(model, seed)), tokens(seed), chunk), spread / 4)
            assert result.codes > 10_000
            assert result.roots <= FLIPS, str(result)
            assert result.max_difference_where_codes_agree <= TOLERANCE * spread, str(result)
            assert result.greedy_equal_above_margin and result.decided >= 5, str(result)


@pytest.mark.parametrize("name", ["tensor scales, tied bfloat16 head", "norms of heads, ternary head"])
def test_hidden_states_are_what_the_head_is_given(name: str) -> None:
    """numpy's head on them gives each engine's logits; of the exact engines the same ones, whatever the chunks."""
    changes, options = MODELS[name]
    weights = random_weights(tiny_config(**changes), seed=3, **options)
    ids = np.random.default_rng(4).integers(0, weights.config.vocab_size, LENGTH).tolist()
    reference = NumpyDecoder(weights)
    exact = reference.step([ids], [reference.make_cache()], "all")[0]
    for engine in (reference, CpuDecoder(weights), MlxModel.from_weights(weights, "float32")):
        caches = [engine.make_cache() for _ in range(4)]
        chunks = [[ids[:7], ids[:30]], [ids[7:], ids[30:]]]
        states = [engine.hidden(chunk, caches[:2]) for chunk in chunks]
        logits = [engine.step(chunk, caches[2:], "all") for chunk in chunks]
        for sequence in range(2):
            x, y = (np.concatenate([rows[sequence] for rows in made]) for made in (states, logits))
            assert x.shape == (LENGTH, weights.config.hidden_size) and x.dtype == np.float32
            found = ref.dense_linear(x, weights.lm_head)
            if engine.name in EXACT:
                np.testing.assert_array_equal(found, exact)
            np.testing.assert_allclose(found, y, atol=TOLERANCE * float(exact.std()))
