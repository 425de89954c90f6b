"""Whole models from GGUF files: every architecture and type, against the weights they were made of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import quants

from bitnet_mlx.checkpoint.read import open_weights, read_weights
from bitnet_mlx.checkpoint.read_gguf import read_gguf
from bitnet_mlx.errors import ConfigError
from bitnet_mlx.formats import words2
from bitnet_mlx.formats.dense import DenseRows, GroupedRows
from bitnet_mlx.models.config import DecoderConfig
from bitnet_mlx.models.weights import DecoderWeights, Linear
from bitnet_mlx.ternary import TernaryTensor, ternarize
from tests.support import gguf_models
from tests.support.random_model import random_weights, tiny_config
from tests.support.same_weights import assert_same

SIZES: dict[str, Any] = dict(
    vocab_size=40, hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, head_dim=64
)
FAMILIES: dict[str, dict[str, Any]] = {
    "bitnet": dict(model_type="bitnet", hidden_act="silu", sub_norms=True),
    "bitnet-25": dict(model_type="bitnet", hidden_act="relu2", sub_norms=True),
    "bitnet-b1.58": dict(model_type="bitnet", hidden_act="relu2", sub_norms=True),
    "llama": dict(model_type="llama", hidden_act="silu", sub_norms=False, tie_word_embeddings=False),
    "qwen3": dict(model_type="qwen3", hidden_act="silu", sub_norms=False, qk_norms=True, rms_norm_eps=1e-6),
}
CONFIG_KEYS = (
    "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim rms_norm_eps max_position_embeddings hidden_act sub_norms qk_norms tie_word_embeddings rope activation_bits"
).split()


def model(
    architecture: str, seed: int = 0, scale: str = "tensor", bias: bool = False, **changes: Any
) -> DecoderWeights:
    """Random weights whose scales and embeddings float16 holds exactly."""
    config = tiny_config(**{**SIZES, **FAMILIES[architecture], **changes})
    weights = random_weights(config, seed, scale, "float32", bias)
    for linear in weights.linears.values():
        assert isinstance(linear.weight, TernaryTensor)
        linear.weight.scale[...] = linear.weight.scale.astype(np.float16)
    for matrix in (weights.embed_tokens, weights.lm_head):
        assert isinstance(matrix, DenseRows)
        matrix.data[...] = matrix.data.astype(np.float16)
    return weights


def written(path: Path, weights: DecoderWeights, architecture: str, kind: str, **options: Any) -> Path:
    keys = gguf_models.metadata(weights.config, architecture)
    content = gguf_models.tensors(weights, kind, permute=architecture == "llama", **options)
    return gguf_models.write(path / "model.gguf", keys, content)


def same_config(found: DecoderConfig, expected: DecoderConfig) -> None:
    for key in CONFIG_KEYS:
        assert getattr(found, key) == getattr(expected, key), key


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0", "I2_S"])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_weight_of_every_architecture(architecture: str, kind: str, tmp_path: Path) -> None:
    expected = model(architecture)
    # Ternary Qwen models are trained with floats as activations, but bitnet.cpp's type quantises them.
    bits = 16 if architecture == "qwen3" and kind != "I2_S" else 8
    found = read_gguf(written(tmp_path, expected, architecture, kind, head="F32"))
    same_config(found.config, replace(expected.config, activation_bits=bits))
    assert_same(found, expected)
    assert {linear.weight.activation_bits for linear in found.linears.values()} == {bits}  # type: ignore[union-attr]
    assert (found.lm_head is found.embed_tokens) == expected.config.tie_word_embeddings


@pytest.mark.parametrize("layout", ["128", "64", "rows"])
def test_the_layout_can_be_told(layout: str, tmp_path: Path) -> None:
    expected = model("bitnet-b1.58")
    path = written(tmp_path, expected, "bitnet-b1.58", "I2_S", head="F32", layout=layout)
    assert_same(read_gguf(path, i2s_layout=layout), expected)


def test_biases_heads_of_their_own_size_and_rotation_of_q_and_k(tmp_path: Path) -> None:
    expected = model("llama", bias=True, head_dim=128, num_attention_heads=4, num_key_value_heads=2)
    found = read_gguf(written(tmp_path, expected, "llama", "TQ2_0", head="F32"))
    same_config(found.config, expected.config)
    assert_same(found, expected)


@pytest.mark.parametrize("head", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q6_K", "Q4_K"])
def test_embedding_and_head_of_every_type(head: str, tmp_path: Path) -> None:
    expected = model("llama")
    path = written(tmp_path, expected, "llama", "TQ2_0", head=head)
    found, small = read_gguf(path), read_gguf(path, head_bits=8)
    for name, rows, ours in (
        ("embed_tokens", found.embed_tokens, small.embed_tokens),
        ("lm_head", found.lm_head, small.lm_head),
    ):
        values = getattr(expected, name).rows(slice(None))
        raw = np.frombuffer(gguf_models.encode(values, head), np.uint8).reshape(len(values), -1)
        owner = quants.dequantize(raw, Type[head])
        assert isinstance(rows, DenseRows) and isinstance(ours, GroupedRows) and ours.bits == 8
        np.testing.assert_array_equal(rows.rows(slice(None)), owner)
        np.testing.assert_allclose(ours.rows(slice(None)), owner, atol=np.abs(owner).max() / 250)
    stored = {"F16": "float16", "BF16": "bfloat16"}.get(head, "float32")
    assert isinstance(found.lm_head, DenseRows) and found.lm_head.dtype == stored


@pytest.mark.parametrize("group", ["64", "128"])
def test_q2_0_everywhere_with_both_sizes_of_group(group: str, tmp_path: Path) -> None:
    expected = model("llama", scale="group")
    for name in ("embed_tokens", "lm_head"):
        t, _ = ternarize(getattr(expected, name).rows(slice(None)))
        scale = np.float32([[0.5, 0.25]] * len(t)) * np.arange(1, len(t) + 1, dtype=np.float32)[:, None]
        setattr(expected, name, TernaryTensor(words2.pack(t), scale, t.shape, 16))
    found = read_gguf(written(tmp_path, expected, "llama", "Q2_0", head="Q2_0", layout=group))
    assert found.config.activation_bits == 16 and {w.weight.activation_bits for w in found.linears.values()} == {16}
    assert_same(found, expected)


def test_scales_of_blocks_become_the_tensors_rows_or_groups(tmp_path: Path) -> None:
    for scale, bits in (("tensor", 8), ("row", 16), ("group", 16)):
        expected = model("llama", scale=scale)
        for linear in expected.linears.values():
            assert isinstance(linear.weight, TernaryTensor)
            if scale == "group":  # a block of TQ2_0 has 256 columns
                linear.weight.scale[:, 1::2] = linear.weight.scale[:, ::2]
        found = read_gguf(written(tmp_path, expected, "llama", "TQ2_0", head="F32"))
        assert found.config.activation_bits == bits
        for name, linear in found.linears.items():
            assert isinstance(linear.weight, TernaryTensor)
            np.testing.assert_array_equal(
                gguf_models.dense(linear.weight), gguf_models.dense(expected.linears[name].weight)
            )
        assert read_gguf(tmp_path / "model.gguf", activations=24 - bits).config.activation_bits == 24 - bits


@pytest.mark.parametrize("kind", ["F32", "F16"])
def test_floats_of_a_bitnet_model_that_are_ternary_stay_exact(kind: str, tmp_path: Path) -> None:
    expected = model("bitnet-b1.58")
    assert_same(read_gguf(written(tmp_path, expected, "bitnet-b1.58", kind, head="F32")), expected)


def test_master_weights_are_ternarised_and_said_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected, rng = model("bitnet-b1.58"), np.random.default_rng(3)
    for name, linear in expected.linears.items():
        n, k = linear.weight.shape
        expected.linears[name] = Linear(DenseRows(rng.standard_normal((n, k)).astype(np.float32), "float32"))
    found = read_gguf(written(tmp_path, expected, "bitnet-b1.58", "F32"))
    assert "14 matrices hold floats that are not ternary; they were ternarised by their mean" in caplog.text
    for name, linear in found.linears.items():
        t, m = ternarize(expected.linears[name].weight.rows(slice(None)))
        assert isinstance(linear.weight, TernaryTensor) and linear.weight.activation_bits == 8
        np.testing.assert_array_equal(linear.weight.rows(slice(None)), t * m)


def test_floats_of_other_models_run_as_floats(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = model("llama", bias=True)
    found = read_gguf(written(tmp_path, expected, "llama", "F16", head="F32"))
    assert "layers are not ternary; they run as floats" in caplog.text
    for name, linear in found.linears.items():
        there = expected.linears[name]
        assert isinstance(linear.weight, DenseRows) and linear.weight.dtype == "float16"
        np.testing.assert_array_equal(linear.weight.rows(slice(None)), there.weight.rows(slice(None)))
        np.testing.assert_array_equal(linear.bias, there.bias)


def test_a_factor_beside_a_matrix_is_part_of_its_scale(tmp_path: Path) -> None:
    """llama.cpp multiplies the product with attn_q.scale."""
    expected = model("bitnet-b1.58")
    keys = gguf_models.metadata(expected.config, "bitnet-b1.58")
    content = gguf_models.tensors(expected, "TQ2_0", "F32")
    content["blk.1.ffn_up.scale"] = ((1,), 0, np.float32(0.25).tobytes())
    up = expected.linears["model.layers.1.mlp.up_proj"].weight
    assert isinstance(up, TernaryTensor)
    up.scale[...] *= np.float32(0.25)
    assert_same(read_gguf(gguf_models.write(tmp_path / "a.gguf", keys, content)), expected)


def test_a_matrix_of_zeros_has_a_scale_above_0(tmp_path: Path) -> None:
    weights = model("bitnet-b1.58")
    name = "model.layers.0.mlp.up_proj"
    zeros = words2.pack(np.zeros(weights.linears[name].weight.shape, np.int8))
    weights.linears[name] = Linear(replace(weights.linears[name].weight, words=zeros))
    found = read_gguf(written(tmp_path, weights, "bitnet-b1.58", "F32")).linears[name].weight
    assert isinstance(found, TernaryTensor) and np.array_equal(found.words, zeros) and found.scale > 0


def test_options_of_folders_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, model("llama"), "llama", "I2_S")
    with pytest.raises(ConfigError, match="ternarize was given, and .* is a GGUF file; it is for folders"):
        read_weights(path, ternarize=True)
    for options in ({"keep": ("model.layers.0.mlp.up_proj",)}, {"floats": True}):
        with pytest.raises(ConfigError, match="linears are made ternary, or kept, from folders alone"):
            open_weights(path, **options)


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = written(tmp_path, model("llama"), "llama", "TQ1_0")
    read_gguf(path, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (path.stat().st_size,) * 2 and [done for done, _ in seen] == sorted(done for done, _ in seen)
