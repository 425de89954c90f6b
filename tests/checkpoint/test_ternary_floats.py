"""Weights that are ternary already: as floats (TriLM, Bonsai unpacked), and in MLX's 2-bit form (Bonsai for MLX)."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from bitnet_mlx.checkpoint.census import take_census
from bitnet_mlx.checkpoint.read import read_weights
from bitnet_mlx.checkpoint.weigh import model_size
from bitnet_mlx.checkpoint.write import write_native
from bitnet_mlx.errors import ConfigError, FormatError, UnsupportedModelError
from bitnet_mlx.formats import words2
from bitnet_mlx.formats.dense import DenseRows
from bitnet_mlx.models.decoder_numpy import NumpyDecoder
from bitnet_mlx.ternary import TernaryTensor
from tests.support import hf_folder
from tests.support.same_weights import assert_same

SIZES: dict[str, Any] = dict(
    hidden_size=128, intermediate_size=384, head_dim=64, vocab_size=33, attention_bias=False, tie_word_embeddings=False
)
DOWN = "model.layers.1.mlp.down_proj"


def groups(rng: np.random.Generator, shape: tuple[int, ...], group: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """t int8 [N, K] and float16 scales [N, K / group]."""
    scale = rng.uniform(0.02, 0.5, (shape[0], shape[1] // group)).astype(np.float16)
    return rng.integers(-1, 2, shape).astype(np.int8), scale


def bonsai(path: Path, dtype: mx.Dtype = mx.float16, **changes: Any) -> tuple[hf_folder.HFFolder, dict[str, Any]]:
    """A Qwen3 folder whose linears, embedding and head are ternary floats; (t, scale) of each by module."""
    wrote = hf_folder.write(path, "qwen3", "dense", dtype=dtype, **{**SIZES, **changes})
    rng = np.random.default_rng(4)
    parts = {}
    for name, value in wrote.tensors.items():
        if value.ndim == 2:
            t, scale = parts[name.removesuffix(".weight")] = groups(rng, value.shape)
            wrote.tensors[name] = mx.array((t * np.repeat(scale, 128, axis=1)).astype(np.float32)).astype(dtype)
    wrote.save()
    return wrote, parts


def opened(path: Path) -> hf_folder.HFFolder:
    """A folder to change and save again."""
    tensors: Any = mx.load(str(path / "model.safetensors"))
    mx.eval(tensors)
    return hf_folder.HFFolder(path, json.loads((path / "config.json").read_text()), dict(tensors))


def to_mlx(folder: hf_folder.HFFolder, parts: dict[str, Any], path: Path, group: int = 128, sign: int = 1) -> Path:
    """The same model as mlx-lm stores 2 bits: words by MLX's rule, scales and biases in float16."""
    tensors = dict(folder.tensors)
    for module, (t, scale) in parts.items():
        codes = (sign * t + 1).astype(np.uint32).reshape(*t.shape[:1], -1, 16)
        words = (codes << np.arange(0, 32, 2, dtype=np.uint32)).sum(axis=2, dtype=np.uint32)
        many = np.repeat(scale, 128 // group, axis=1)
        tensors[f"{module}.weight"] = mx.array(words)
        tensors[f"{module}.scales"], tensors[f"{module}.biases"] = mx.array(sign * many), mx.array(-sign * many)
    table = {"bits": 2, "group_size": group}
    config = {**folder.config, "quantization": table, "quantization_config": table}
    hf_folder.HFFolder(path, config, tensors).save()
    return path


def test_floats_are_packed_as_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wrote, parts = bonsai(tmp_path)
    weights = read_weights(tmp_path)
    assert "ternary already" in caplog.text and "--activations 8" in caplog.text
    assert weights.config.activation_bits == 16 and weights.config.qk_norms
    matrices = {name: linear.weight for name, linear in weights.linears.items()}
    matrices |= {"model.embed_tokens": weights.embed_tokens, "lm_head": weights.lm_head}
    assert matrices.keys() == parts.keys()
    for name, w in matrices.items():
        assert isinstance(w, TernaryTensor) and w.activation_bits == 16, name
        expected = np.array(wrote.tensors[f"{name}.weight"].astype(mx.float32))
        assert np.array_equal(w.rows(slice(None)), expected), name
        assert w.nbytes < expected.nbytes / 10
    assert read_weights(tmp_path, activations=8).config.activation_bits == 8
    assert take_census(tmp_path).info.scale_direction is None  # the file has no scales


def test_a_linear_that_is_nothing_like_ternary_stays_a_float(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Such as one that an adapter was fused into."""
    wrote, _ = bonsai(tmp_path)
    values = np.random.default_rng(5).standard_normal(wrote.tensors[f"{DOWN}.weight"].shape).astype(np.float16)
    wrote.tensors[f"{DOWN}.weight"] = mx.array(values)
    wrote.save()
    weights = read_weights(tmp_path)
    floats = {name: linear.weight for name, linear in weights.linears.items() if isinstance(linear.weight, DenseRows)}
    assert list(floats) == [DOWN] and np.array_equal(floats[DOWN].rows(slice(None)), values.astype(np.float32))
    assert "1 of 14 linears are not ternary and stay floats" in caplog.text


@pytest.mark.parametrize("group", [128, 64])
@pytest.mark.parametrize("sign", [1, -1])
def test_mlx_2_bit_is_the_same_model(tmp_path: Path, group: int, sign: int) -> None:
    """A negative scale is MLX's other way to write the same weights."""
    folder, parts = bonsai(tmp_path / "floats")
    path = to_mlx(folder, parts, tmp_path / "mlx", group, sign)
    floats, found = read_weights(folder.path), read_weights(path)
    assert_same(floats, found)
    decoders = [NumpyDecoder(floats), NumpyDecoder(found)]
    a, b = (d.step([[1, 5, 9]], [d.make_cache()], "all")[0] for d in decoders)
    assert np.array_equal(a, b)


def test_mlx_itself_reads_the_same_values(tmp_path: Path) -> None:
    """mx.dequantize, the library that owns the form, gives our rows."""
    folder, parts = bonsai(tmp_path / "floats")
    path = to_mlx(folder, parts, tmp_path / "mlx")
    raw: Any = mx.load(str(path / "model.safetensors"))
    w = read_weights(path).linears[DOWN].weight
    dense = mx.dequantize(*(raw[f"{DOWN}.{part}"] for part in ("weight", "scales", "biases")), group_size=128, bits=2)
    assert np.array_equal(np.array(dense.astype(mx.float32)), w.rows(slice(None)))


def test_mlx_linears_without_scales_are_floats(tmp_path: Path) -> None:
    folder, parts = bonsai(tmp_path / "floats")
    del parts[DOWN], parts["lm_head"]
    weights = read_weights(to_mlx(folder, parts, tmp_path / "mlx"))
    assert isinstance(weights.linears[DOWN].weight, DenseRows) and isinstance(weights.lm_head, DenseRows)
    assert isinstance(weights.embed_tokens, TernaryTensor)


def test_groups_of_64_in_rows_of_no_whole_128(tmp_path: Path) -> None:
    folder, parts = bonsai(tmp_path / "floats")
    path = to_mlx(folder, parts, tmp_path / "mlx", 64)
    t, scale = groups(np.random.default_rng(8), (128, 192), 64)
    scale[:, 1] = scale[:, 0]
    wrote = opened(path)
    wrote.config["intermediate_size"] = 192
    for layer in (0, 1):
        for name in ("gate_proj", "up_proj"):
            for part in ("weight", "scales", "biases"):
                full = f"model.layers.{layer}.mlp.{name}.{part}"
                wrote.tensors[full] = wrote.tensors[full][:192]
        codes = (t + 1).astype(np.uint32).reshape(128, -1, 16)
        words = (codes << np.arange(0, 32, 2, dtype=np.uint32)).sum(axis=2, dtype=np.uint32)
        at = f"model.layers.{layer}.mlp.down_proj"
        wrote.tensors |= {
            f"{at}.weight": mx.array(words),
            f"{at}.scales": mx.array(scale),
            f"{at}.biases": mx.array(-scale),
        }
    wrote.save()
    w = read_weights(path).linears[DOWN].weight
    assert np.array_equal(w.rows(slice(None)), t * np.repeat(scale.astype(np.float32), 64, axis=1))
    scale[3, 1] *= 2
    wrote.tensors |= {f"{DOWN}.scales": mx.array(scale), f"{DOWN}.biases": mx.array(-scale)}
    wrote.save()
    with pytest.raises(UnsupportedModelError, match=rf"{DOWN}.weight has a scale for each 64 columns.*row 3"):
        read_weights(path)


@pytest.mark.parametrize("change", ["code 3", "bias", "scale", "zero scale", "short"])
def test_mlx_forms_that_are_refused(tmp_path: Path, change: str) -> None:
    folder, parts = bonsai(tmp_path / "floats")
    path = to_mlx(folder, parts, tmp_path / "mlx")
    wrote = opened(path)
    tensors = wrote.tensors
    words, scales = np.array(tensors[f"{DOWN}.weight"]), np.array(tensors[f"{DOWN}.scales"])
    text = {
        "code 3": "code 3 in row 2", "bias": r"is -?0\.\d+ in row 1, group 0.*bias -scale",
        "scale": "holds NaN or infinity", "zero scale": None, "short": r"U32 \[128, 23\]; U32 \[128, 24\]",
    }[change]  # fmt: skip
    if change == "code 3":
        words[2, 5] |= 3
    elif change == "bias":
        tensors[f"{DOWN}.biases"][1, 0] *= 0.5  # as MLX's own quantiser leaves it
    elif change == "scale":
        scales[0, 1] = np.inf
    elif change == "zero scale":  # a group of zeros, whatever its codes
        scales[0, 1], words[0, 8:16] = 0, 0
        tensors[f"{DOWN}.biases"][0, 1] = 0
    else:
        words = words[:, :-1]
    tensors |= {f"{DOWN}.weight": mx.array(words), f"{DOWN}.scales": mx.array(scales)}
    wrote.save()
    if text is None:
        assert not read_weights(path).linears[DOWN].weight.rows(slice(0, 1))[0, 128:256].any()
        return
    with pytest.raises(FormatError, match=text):
        read_weights(path)


def test_one_step_of_float16_is_one_magnitude_and_more_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wrote, parts = bonsai(tmp_path)
    name = f"{DOWN}.weight"
    w = np.array(wrote.tensors[name])
    row = int(np.argwhere(np.count_nonzero(w[:, :128], axis=1) > 40)[0, 0])
    at = int(np.flatnonzero(w[row])[0])
    w[row, at] = np.nextafter(w[row, at], np.float16(9))
    wrote.tensors[name] = mx.array(w)
    wrote.save()
    with caplog.at_level(logging.INFO):
        found = read_weights(tmp_path).linears[DOWN].weight
    assert isinstance(found, TernaryTensor)
    assert found.scale[row, 0] == parts[DOWN][1][row, 0] and "1 groups hold two magnitudes" in caplog.text
    w[row, at] *= 1.5
    wrote.tensors[name] = mx.array(w)
    wrote.save()
    with pytest.raises(
        FormatError, match=rf"{name}' is not ternary: row {row} has magnitudes from .* columns 0 to 127"
    ):
        read_weights(tmp_path)


def test_two_scales_of_bfloat16_are_never_taken_for_one(tmp_path: Path) -> None:
    wrote, _ = bonsai(tmp_path, mx.bfloat16)
    name = f"{DOWN}.weight"
    w = np.array(wrote.tensors[name].astype(mx.float32))
    row = int(np.argwhere(np.count_nonzero(w[:, :128], axis=1) > 40)[0, 0])
    at = int(np.flatnonzero(w[row])[0])
    w[row, at] *= 1 + 2**-7
    wrote.tensors[name] = mx.array(w).astype(mx.bfloat16)
    wrote.save()
    with pytest.raises(FormatError, match="is not ternary"):
        read_weights(tmp_path)


def test_master_weights_are_not_taken_for_ternary(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hf_folder.write(tmp_path, "qwen3", "dense", **SIZES)
    assert all(isinstance(linear.weight, DenseRows) for linear in read_weights(tmp_path).linears.values())
    assert "no quantization_config" in caplog.text


def test_ternarize_takes_floats_for_master_weights(tmp_path: Path) -> None:
    """A revision of master weights without a word in its config.json, such as Falcon-E's prequantized one."""
    online = hf_folder.write(tmp_path / "online", "llama", "online")
    plain = hf_folder.write(tmp_path / "plain", "llama", "dense")
    assert_same(read_weights(online.path), read_weights(plain.path, ternarize=True))
    wrong = hf_folder.write(tmp_path / "wrong", "llama", "dense", quantization=None)
    wrong.config["quantization_config"] = {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]}
    wrong.save()
    assert_same(read_weights(online.path), read_weights(wrong.path, ternarize=True))
    native = write_native(read_weights(online.path), online.config, tmp_path / "native")
    with pytest.raises(ConfigError, match="ternarize was given and the weights are stored as words2"):
        read_weights(native, ternarize=True)


def test_a_layer_of_zeros_does_not_make_a_float_model_ternary(tmp_path: Path) -> None:
    wrote = hf_folder.write(tmp_path, "llama", "dense")
    for name, value in wrote.tensors.items():
        if name.startswith("model.layers.0.") and value.ndim == 2:
            wrote.tensors[name] = mx.zeros_like(value)
    wrote.save()
    assert all(isinstance(linear.weight, DenseRows) for linear in read_weights(tmp_path).linears.values())


def test_the_native_form_keeps_ternary_tables_and_census_counts_them(tmp_path: Path) -> None:
    wrote, _ = bonsai(tmp_path / "floats")
    weights = read_weights(wrote.path)
    native = write_native(weights, wrote.config, tmp_path / "native")
    assert_same(read_weights(native), weights)
    for folder, storage in ((wrote.path, "unpacked"), (native, "words2")):
        census = take_census(folder)
        assert (census.info.storage, census.info.activation_bits) == (storage, 16)
        assert census.granularity == ("row", "group of 128") and 0.3 < (census.zeros_share or 0) < 0.37
        assert "ternary" in census.head_storage or storage == "words2"
    tables = read_weights(native, activations=8)
    for table in (tables.embed_tokens, tables.lm_head):
        assert isinstance(table, TernaryTensor) and table.activation_bits == 16  # their inputs are never quantised


def test_words_of_mlx_are_ours() -> None:
    """formats.md's golden words of the test pattern."""
    i = np.arange(32)
    t = ((7 * i + i // 5) % 3 - 1).astype(np.int8)[None]
    assert words2.pack(t)[0, :2].tolist() == [0x12449124, 0x44912449]


def test_sizes_before_loading_are_those_of_what_is_loaded(tmp_path: Path) -> None:
    folder, parts = bonsai(tmp_path / "floats")
    for path in (folder.path, to_mlx(folder, parts, tmp_path / "mlx")):
        size = model_size(path)
        assert size.head is not None
        held = sum(matrix.host() for matrix in (*size.linears, size.embed, size.head))
        assert held + size.norms == read_weights(path).nbytes
