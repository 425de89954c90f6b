"""16-bit activations on every engine: logits against float64, for every kind of scale and of norm."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from bitnet_mlx.backends.kernels.ops import KernelOps
from bitnet_mlx.backends.mlx_affine import StockOps
from bitnet_mlx.models.decoder_mlx import MlxModel
from bitnet_mlx.models.weights import DecoderWeights
from tests.emulator import runner
from tests.model.engines import ENGINES, EXACT, build
from tests.model.float64 import Float64
from tests.support.random_model import random_weights, tiny_config

# The stated tolerance: the largest error of a logit, over the standard deviation of all of them, in float32.
# Measured on x86: at most 3e-6 for numpy and cpu, 8e-6 for MLX's CPU device, 1.2e-5 for the kernels, emulated.
TOLERANCE = 5e-5
LLAMA: dict[str, Any] = dict(model_type="llama", hidden_act="silu", sub_norms=False, tie_word_embeddings=False)
# K of 260 and 390: two and three groups of 128 and a rest, and no multiple of 16.
WIDE: dict[str, Any] = dict(
    hidden_size=260, intermediate_size=390, num_attention_heads=5, num_key_value_heads=1, head_dim=52
)
ALL = tuple(tiny_config().linear_shapes())
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tensor": (WIDE, dict(head="float32")),
    "row": ({**LLAMA, **WIDE}, dict(scale="row", head="bfloat16", bias=True)),
    "group, norms of heads, ternary head": ({**LLAMA, **WIDE, "qk_norms": True}, dict(scale="group", head="ternary")),
    "group, norms in linears": ({**LLAMA, **WIDE}, dict(scale="group", head="float32", normed=ALL[:5])),
}
TOKENS = [int(t) for t in np.random.default_rng(3).integers(0, 67, 24)]


@cache
def weights(model: str, bits: int = 16) -> DecoderWeights:
    config, changes = MODELS[model]
    return random_weights(tiny_config(activation_bits=bits, **config), 1, **changes)


@cache
def exact(model: str) -> np.ndarray:
    return Float64(weights(model)).logits(TOKENS)


def error(found: np.ndarray, model: str) -> float:
    expected = exact(model)
    return float(np.abs(found - expected[: len(found)]).max() / expected.std())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("engine", ENGINES)
def test_logits_are_those_of_float64(engine: str, model: str) -> None:
    decoder = build(engine, weights(model))
    found = decoder.step([TOKENS], [decoder.make_cache()], "all")[0]
    assert error(found, model) < TOLERANCE
    cache = decoder.make_cache()
    single = np.stack([decoder.step([[token]], [cache])[0] for token in TOKENS])
    assert error(single, model) < TOLERANCE
    if engine in EXACT:
        np.testing.assert_array_equal(single, found)


@pytest.mark.parametrize("model", MODELS)
def test_logits_of_the_kernels_are_those_of_float64(model: str) -> None:
    """Emulated; eight rows and fewer go through our kernel for floats, more through stock MLX."""
    decoder = MlxModel.from_weights(weights(model), "float32", KernelOps("metal", runner))
    cache = decoder.make_cache()
    parts = [decoder.step([TOKENS[at : at + size]], [cache], "all")[0] for at, size in ((0, 7), (7, 1), (8, 16))]
    assert error(np.concatenate(parts), model) < TOLERANCE


class Compiling(StockOps):
    """Stock operations whose decoder compiles what it can, as it does over our kernels."""

    compiles = True


@pytest.mark.parametrize("model", MODELS)
def test_logits_of_a_compiled_decoder_are_those_of_float64(model: str) -> None:
    decoder = MlxModel.from_weights(weights(model), "float32", Compiling())
    cache = decoder.make_cache()
    parts = [decoder.step([TOKENS[at : at + size]], [cache], "all")[0] for at, size in ((0, 10), (10, 1), (11, 13))]
    assert error(np.concatenate(parts), model) < TOLERANCE


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("engine", EXACT)
def test_a_model_of_8_bits_is_another(engine: str, model: str) -> None:
    """The tolerance tells the two apart by far."""
    decoder = build(engine, weights(model, 8))
    assert error(decoder.step([TOKENS], [decoder.make_cache()], "all")[0], model) > 1000 * TOLERANCE


def test_bfloat16_stays_near() -> None:
    """What passes between layers is rounded to 8 bits; products are still summed in float32. Measured: 0.074."""
    model = "group, norms of heads, ternary head"
    decoder = MlxModel.from_weights(weights(model), "bfloat16")
    found = decoder.step([TOKENS], [decoder.make_cache()], "all")[0]
    assert error(found, model) < 0.15
