"""hf-float: a model as plain floats, which any reader of safetensors and stock mlx-lm take as it is."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file

from bitnet_mlx import convert
from bitnet_mlx.checkpoint.read import read_weights
from bitnet_mlx.errors import ConfigError
from bitnet_mlx.models.decoder_numpy import NumpyDecoder
from bitnet_mlx.ternary import TernaryTensor
from tests.support import hf_folder


def test_every_weight_is_its_value_and_no_quantiser_is_left(tmp_path: Path) -> None:
    wrote = hf_folder.write(tmp_path / "source", "llama", scale_dtype=mx.float32, attention_bias=True)
    done = convert(wrote.path, tmp_path / "out", "hf-float")
    assert done.notices[:1] == [
        "activations are not quantised in this form; logits differ by what the quantiser rounds"
    ]
    assert done.parameters == sum(t.size for t in wrote.t.values()) + sum(a.size for a in wrote.floats.values())
    found, weights = load_file(tmp_path / "out" / "model.safetensors"), read_weights(wrote.path)
    for module, linear in weights.linears.items():
        assert isinstance(linear.weight, TernaryTensor)
        value = found.pop(f"{module}.weight")
        assert value.dtype == np.float32 and np.array_equal(value, wrote.t[module] * linear.weight.scale)
        if linear.bias is not None:
            assert np.array_equal(found.pop(f"{module}.bias"), linear.bias)
    assert found.keys() == {name for name in wrote.floats if not name.endswith("bias")}
    assert all(np.array_equal(value, wrote.floats[name]) for name, value in found.items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and config["torch_dtype"] == config["dtype"] == "float32"


def test_stock_mlx_lm_runs_it_as_we_do_without_quantised_activations(tmp_path: Path) -> None:
    from mlx_lm.utils import load_model

    wrote = hf_folder.write(tmp_path / "source", "llama", head_dim=18)
    convert(wrote.path, tmp_path / "out", "hf-float")
    tokens = np.random.default_rng(1).integers(0, 67, (1, 40))
    with mx.stream(mx.cpu):
        model, _ = load_model(tmp_path / "out")
        theirs = np.array(model(mx.array(tokens)))[0]
    decoder = NumpyDecoder(read_weights(wrote.path, activations=16))
    ours = decoder.step(tokens.tolist(), [decoder.make_cache()], "all")[0]
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(ours).max()


def test_a_head_of_few_bits_has_no_place_there(tmp_path: Path) -> None:
    wrote = hf_folder.write(tmp_path / "source", "llama")
    with pytest.raises(ConfigError, match="head_bits is 8; --format hf-float holds floats alone: give 16"):
        convert(wrote.path, tmp_path / "out", "hf-float", head_bits=8)
