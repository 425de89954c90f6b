"""Sub-norms that a float model is given: nothing at first, a whole norm at last, and what the written folder is read as."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from bitnet_mlx.checkpoint.read import read_weights
from bitnet_mlx.errors import ConfigError
from bitnet_mlx.models.decoder_mlx import MlxModel
from bitnet_mlx.models.decoder_numpy import NumpyDecoder
from bitnet_mlx.train.masters import make_student, set_blend, trained
from bitnet_mlx.train.qat import qat
from bitnet_mlx.train.sub_norms import settle, with_sub_norms
from tests.support import hf_folder
from tests.train.support import qat_options, silent

IDS = mx.array([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])


def student_of(folder: Path) -> MlxModel:
    student = make_student(with_sub_norms(read_weights(folder)), sub_norms=True)
    settle(student, IDS)
    return student


@pytest.mark.parametrize("blend", [0.0, mx.array(0.0)])
def test_a_student_starts_as_the_float_model(tmp_path: Path, blend: Any) -> None:
    hf_folder.write(tmp_path, "llama", "dense")
    student = student_of(tmp_path)
    set_blend(student.layers, [blend, blend])
    assert mx.array_equal(student(IDS), MlxModel(read_weights(tmp_path))(IDS)).item()


def test_a_new_norm_keeps_the_size_of_what_passes(tmp_path: Path) -> None:
    """Its one number is the mean root mean square, in float64, and it is trained; between the ends the two are mixed."""
    hf_folder.write(tmp_path, "llama", "dense")
    student = student_of(tmp_path)
    norm = student.layers[1].mlp.ffn_sub_norm
    passed: list[np.ndarray] = []
    down = student.layers[1].mlp.down_proj

    class Watched(type(down)):  # type: ignore[misc]
        def prepare(self, x: mx.array) -> mx.array:
            passed.append(np.array(x, np.float64))
            return super().prepare(x)

    down.__class__ = Watched
    mx.eval(student(IDS))
    expected = np.sqrt((passed[0] ** 2).mean(-1)).mean()
    np.testing.assert_allclose(np.array(norm.weight), expected, rtol=1e-5)
    assert sum("sub_norm" in name for name in trained(student)) == 4
    y = mx.array(np.random.default_rng(0).standard_normal((2, 3, 100)).astype(np.float32))
    wide = np.array(y, np.float64)
    full = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + norm.eps) * expected
    for blend in (0.25, 1.0, mx.array(0.25), mx.array(1.0)):
        norm.blend = blend
        b = float(np.array(blend))
        np.testing.assert_allclose(np.array(norm(y)), (1 - b) * wide + b * full, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "changes", "kind"),
    [
        ("llama", {"attention_bias": True, "rope_theta": 3000.0}, "bitnet"),
        ("qwen3", {"head_dim": 18, "tie_word_embeddings": True}, "bitnet_qwen3"),
    ],
)
def test_the_folder_is_read_as_the_model_that_was_trained(
    tmp_path: Path, family: str, changes: dict[str, Any], kind: str
) -> None:
    run = qat_options(tmp_path, "out", family, sub_norms=True, learning_rate=3e-3, eval_data=(), **changes)
    qat(run, silent)
    config = json.loads((run.output / "config.json").read_text())
    assert config["model_type"] == kind and ("architectures" in config) == (kind == "bitnet")
    weights = read_weights(run.output)
    assert weights.config.sub_norms and weights.config.hidden_act == "silu"
    assert weights.config.rope.rope_theta == changes.get("rope_theta", 500000.0)
    student = make_student(with_sub_norms(read_weights(tmp_path / "float")), sub_norms=True)
    state = mx.load(str(run.output / "checkpoints" / "step-00000006" / "state.safetensors"))
    assert isinstance(state, dict)
    student.load_weights([(name, state[f"parameters.{name}"]) for name in trained(student)], strict=False)
    set_blend(student.layers, [1.0, 1.0])
    ids = IDS[:1]
    expected, cache = np.array(student(ids)[0]), NumpyDecoder(weights)
    found = cache.step([ids[0].tolist()], [cache.make_cache()], "all")[0]
    off = np.abs(found - expected).max(axis=-1) / expected.std()
    assert np.median(off) < 1e-4 and off.max() < 0.5  # an int8 code may flip at a position
    assert (weights.layer_norm(0, "mlp.ffn_sub_norm") != weights.layer_norm(0, "mlp.ffn_sub_norm")[0]).any()


def test_what_gets_no_sub_norms(tmp_path: Path) -> None:
    hf_folder.write(tmp_path / "bitnet", "bitnet", "dense")
    hf_folder.write(tmp_path / "biased", "llama", "dense", mlp_bias=True)
    for name, message in (("bitnet", "has sub-norms already"), ("biased", "mlp.gate_proj has a bias")):
        with pytest.raises(ConfigError, match=message):
            with_sub_norms(read_weights(tmp_path / name))
