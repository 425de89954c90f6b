"""The golden cases as GGUF files: the same logits of transformers, through the other container."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from bitnet_mlx.checkpoint.read_gguf import read_gguf
from bitnet_mlx.formats.dense import DenseRows, float32_to_bfloat16
from bitnet_mlx.models.config import DecoderConfig
from tests.golden import by_hand, check
from tests.golden.cases import CASES
from tests.model.engines import ENGINES, build
from tests.support import gguf_models
from tests.support.same_weights import assert_same

ARCHITECTURES = {"bitnet": "bitnet-b1.58", "llama": "llama", "qwen3": "qwen3"}
NAMES = (
    "bitnet-online",
    "bitnet-packed-f32",
    "bitnet-packed",
    "bitnet-inverse",
    "llama-inverse",
    "qwen3-online",
)
# Scales of rows or groups with floats as activations, and sizes that no block divides: in the type that holds them.
OTHERS = {"qwen3-groups": "Q2_0", "llama-shards": "Q2_0", "1bitllm": "F32"}
ROWS = ("llama-auto-yarn", "llama-online-linear")  # whose sizes one layout alone allows
LAYOUTS = [(name, layout) for name in NAMES for layout in ("128", "64", "rows")] + [(name, "rows") for name in ROWS]


def architecture(config: DecoderConfig) -> str:
    if config.sub_norms and config.hidden_act == "silu":
        return "bitnet"  # 1bitLLM's
    return ARCHITECTURES[config.model_type]


def write(name: str, path: Path, layout: str = "128", kind: str = "I2_S") -> Path:
    weights = by_hand.weights(CASES[name])
    c = weights.config
    keys = gguf_models.metadata(c, architecture(c))
    if c.rope.rope_type != "default":
        keys |= {"llama.rope.scaling.type": c.rope.rope_type, "llama.rope.scaling.factor": c.rope.factor}
    if c.rope.rope_type == "yarn":
        keys["llama.rope.scaling.original_context_length"] = c.rope.original_max_position_embeddings
    content = gguf_models.tensors(weights, kind, "BF16", layout, permute=architecture(c) == "llama")
    return gguf_models.write(path / f"{name}.gguf", keys, content)


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_weights_are_those_of_the_recipe(name: str, layout: str, tmp_path: Path) -> None:
    expected = by_hand.weights(CASES[name])
    for key in ("embed_tokens", "lm_head"):
        setattr(expected, key, DenseRows(float32_to_bfloat16(getattr(expected, key).rows(slice(None))), "bfloat16"))
    found = read_gguf(write(name, tmp_path, layout), i2s_layout=layout)
    assert_same(found, expected)
    for key in ("hidden_act", "sub_norms", "rms_norm_eps", "head_dim", "rope", "activation_bits"):
        assert getattr(found.config, key) == getattr(expected.config, key), key


@pytest.mark.parametrize("name", [*NAMES, *ROWS])
@pytest.mark.parametrize("engine", ["numpy", "mlx"])
def test_logits_codes_and_best_tokens(engine: str, name: str, tmp_path: Path) -> None:
    layout = "rows" if name in ROWS else "128"
    found = read_gguf(write(name, tmp_path, layout), i2s_layout=layout)
    assert check.problem(check.trace(build(engine, found), name), name) is None


def test_a_wrong_layout_or_order_is_caught_here(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What the comparison above must be able to see."""
    caplog.set_level(logging.ERROR)
    wrong = read_gguf(write("llama-inverse", tmp_path), i2s_layout="64")
    assert check.problem(check.trace(build("numpy", wrong), "llama-inverse"), "llama-inverse") is not None
    weights = by_hand.weights(CASES["llama-inverse"])
    keys = gguf_models.metadata(weights.config, "llama")
    path = gguf_models.write(tmp_path / "a.gguf", keys, gguf_models.tensors(weights, "I2_S", permute=False))
    unordered = read_gguf(path, i2s_layout="128")
    assert not np.array_equal(
        unordered.linears["model.layers.0.self_attn.q_proj"].weight.rows(slice(None)),
        weights.linears["model.layers.0.self_attn.q_proj"].weight.rows(slice(None)),
    )
    assert check.problem(check.trace(build("numpy", unordered), "llama-inverse"), "llama-inverse") is not None


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("engine", ENGINES)
def test_cases_that_i2_s_does_not_hold(engine: str, name: str, tmp_path: Path) -> None:
    found = read_gguf(write(name, tmp_path, kind=OTHERS[name]))
    assert found.config.activation_bits == CASES[name].activation_bits
    found_trace = check.trace(build(engine, found), name)
    if engine == "cpu" and CASES[name].activation_bits == 8:  # its codes are inside compiled calls
        np.testing.assert_array_equal(found_trace.logits, check.trace(build("numpy", found), name).logits)
        return
    assert check.problem(found_trace, name) is None
