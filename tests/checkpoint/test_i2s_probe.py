"""The I2_S layout found from weights that have the traces of training, and left open where there are none."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from bitnet_mlx.api import embedded_model
from bitnet_mlx.checkpoint import i2s_probe
from bitnet_mlx.checkpoint.gguf_file import GgufFile
from bitnet_mlx.checkpoint.read import read_weights
from bitnet_mlx.checkpoint.read_gguf import read_gguf
from bitnet_mlx.errors import ConfigError, FormatError
from bitnet_mlx.formats import words2
from bitnet_mlx.models.weights import DecoderWeights
from bitnet_mlx.ternary import TernaryTensor
from tests.support import gguf_models
from tests.support.random_model import random_weights, tiny_config
from tests.support.same_weights import assert_same

LAYOUTS = ("128", "64", "rows")
_NORM = {"self_attn.o_proj": "self_attn.attn_sub_norm", "mlp.down_proj": "mlp.ffn_sub_norm"}


def trained(strength: float, seed: int = 0, sub_norms: bool = True, hidden: int = 384) -> DecoderWeights:
    """Random weights whose columns are the emptier the smaller the norm's weight of their channel is."""
    config = tiny_config(
        vocab_size=32, hidden_size=hidden, intermediate_size=2 * hidden, num_attention_heads=4, num_key_value_heads=2,
        head_dim=hidden // 4, sub_norms=sub_norms, model_type="bitnet" if sub_norms else "llama", num_hidden_layers=3,
        hidden_act="relu2" if sub_norms else "silu",
    )  # fmt: skip
    weights, rng = random_weights(config, seed, head="bfloat16"), np.random.default_rng(seed)
    for layer in range(config.num_hidden_layers):
        for name, (n, k) in config.linear_shapes().items():
            default = "input_layernorm" if name.startswith("self_attn") else "post_attention_layernorm"
            norm = weights.norms.get(f"model.layers.{layer}.{_NORM.get(name, default)}", np.zeros(0))
            channel = (norm - norm.mean()) / norm.std() if norm.size == k else np.zeros(k)
            full = np.clip(0.6 + strength * channel, 0.05, 0.95)
            t = np.where(rng.random((n, k)) < full, rng.choice([-1, 1], (n, k)), 0).astype(np.int8)
            old = weights.layer_linear(layer, name).weight
            assert isinstance(old, TernaryTensor)
            old.words[...] = words2.pack(t)
    return weights


def write(path: Path, weights: DecoderWeights, layout: str) -> Path:
    name = "bitnet-b1.58" if weights.config.sub_norms else "llama"
    content = gguf_models.tensors(weights, "I2_S", "BF16", layout, permute=name == "llama")
    return gguf_models.write(path / f"{layout}.gguf", gguf_models.metadata(weights.config, name), content)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("sub_norms", "strength"), [(True, 0.1), (True, 0.03), (False, 0.1)])
def test_each_layout_is_found_and_told(
    layout: str, sub_norms: bool, strength: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = trained(strength, sub_norms=sub_norms, hidden=512 if strength < 0.1 else 384)
    path = write(tmp_path, expected, layout)
    with caplog.at_level(logging.WARNING):
        found = read_gguf(path)
    assert f"I2_S layout {layout}: found from the places of zeros" in caplog.text
    assert_same(found, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_that_was_really_trained(layout: str, tmp_path: Path) -> None:
    """The one in the package: the right layout agrees with its norms ten times better than any other."""
    weights = read_weights(embedded_model())
    content = gguf_models.tensors(weights, "I2_S", "F16", layout)
    keys = gguf_models.metadata(weights.config, "bitnet-b1.58")
    file = GgufFile(gguf_models.write(tmp_path / "tiny.gguf", keys, content))
    names = [name for name, info in file.tensors.items() if info.kind == "I2_S"]
    assert i2s_probe.find(file, names)[0] == layout


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", range(2))
def test_chance_decides_nothing(layout: str, seed: int, tmp_path: Path) -> None:
    file = GgufFile(write(tmp_path, trained(0.0, seed), layout))
    names = [name for name, info in file.tensors.items() if info.kind == "I2_S"]
    chosen, told = i2s_probe.find(file, names)
    assert chosen == "128" and "do not tell" in told and "--i2s-layout" in told


def test_shapes_that_allow_one_layout_or_none(tmp_path: Path) -> None:
    weights = trained(0.0, hidden=72)  # 72 * 72 divides into no block of 128 or 64
    assert_same(read_gguf(write(tmp_path, weights, "rows")), weights)
    file = GgufFile(write(tmp_path, weights, "rows"))
    info = file.tensors["blk.0.attn_q.weight"]
    file.tensors["odd"] = type(info)("odd", "I2_S", (3, 84), info.start, info.stop, info.room)
    with pytest.raises(FormatError, match="the blocks of no layout"):
        i2s_probe.find(file, ["odd"])


def test_a_layout_that_is_none(tmp_path: Path) -> None:
    path = write(tmp_path, trained(0.0), "128")
    with pytest.raises(ConfigError, match="i2s_layout is '32'; 128, 64, rows are allowed"):
        read_gguf(path, i2s_layout="32")
