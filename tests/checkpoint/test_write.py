"""Native folders: written, used in place from the map, compared, and all or nothing."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from bitnet_mlx.checkpoint.read import read_weights
from bitnet_mlx.checkpoint.safetensors_file import SafetensorsFile
from bitnet_mlx.checkpoint.safetensors_writer import pending, write_safetensors
from bitnet_mlx.checkpoint.write import write_native
from bitnet_mlx.errors import ConfigError, FormatError
from bitnet_mlx.formats.dense import GroupedRows, quantize_rows
from bitnet_mlx.models.decoder_numpy import NumpyDecoder
from bitnet_mlx.models.weights import DecoderWeights, Linear
from bitnet_mlx.ternary import TernaryTensor
from tests.support import hf_folder
from tests.support.random_model import random_weights, tiny_config
from tests.support.same_weights import assert_same


def config_of(weights: DecoderWeights, **changes: Any) -> dict[str, Any]:
    """A config.json for a model that was made at random."""
    c = weights.config
    names = (
        "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "max_position_embeddings",
    )  # fmt: skip
    biased = any(linear.bias is not None for linear in weights.linears.values())
    return {**{name: getattr(c, name) for name in names}, "rope_theta": 10000.0, "attention_bias": biased,
            "mlp_bias": biased, "auto_map": {"AutoModel": "x.py"}, **changes}  # fmt: skip


@pytest.mark.parametrize("scale", ["tensor", "row", "group"])
@pytest.mark.parametrize("head", ["float32", "bfloat16", "8", "6", "4"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_storage_comes_back_to_the_last_bit(tmp_path: Path, scale: str, head: str, tied: bool) -> None:
    config = tiny_config(tie_word_embeddings=tied, model_type="llama", sub_norms=False, hidden_act="silu")
    weights = random_weights(config, 3, scale, head, bias=True, dense=("mlp.up_proj",))
    write_native(weights, config_of(weights), tmp_path / "native")
    again = read_weights(tmp_path / "native")
    assert_same(again, weights)
    assert (again.lm_head is again.embed_tokens) == tied


def test_a_group_of_zeros_may_have_the_scale_0(tmp_path: Path) -> None:
    config = tiny_config(hidden_size=256, model_type="llama", sub_norms=False, hidden_act="silu")
    weights = random_weights(config, 3, "group", "float32")
    name = "model.layers.0.self_attn.q_proj"
    w = weights.linears[name].weight
    assert isinstance(w, TernaryTensor)
    words, scale = w.words.copy(), w.scale.copy()
    words[5, 8:16], scale[5, 1] = 0x55555555, 0
    weights.linears[name] = Linear(replace(w, words=words, scale=scale))
    write_native(weights, config_of(weights), tmp_path / "native")
    assert_same(read_weights(tmp_path / "native"), weights)


@pytest.mark.parametrize("storage", ["packed", "inverse", "online"])
def test_from_hugging_face_to_native(tmp_path: Path, storage: str) -> None:
    wrote = hf_folder.write(tmp_path / "hf", storage=storage)
    weights = read_weights(wrote.path)
    folder = write_native(weights, wrote.config, tmp_path / "native")
    native = read_weights(folder)
    assert_same(native, weights)
    a, b = NumpyDecoder(weights), NumpyDecoder(native)
    tokens = [[1, 5, 9, 17]]
    assert np.array_equal(a.step(tokens, [a.make_cache()], "all")[0], b.step(tokens, [b.make_cache()], "all")[0])


def test_the_words_are_used_in_place(tmp_path: Path) -> None:
    weights = random_weights(tiny_config())
    folder = write_native(weights, config_of(weights), tmp_path / "native", head_bits=8)
    native = read_weights(folder)
    assert isinstance(native.embed_tokens, GroupedRows)
    for array in (
        native.embed_tokens.codes,
        *(w.weight.words for w in native.linears.values() if isinstance(w.weight, TernaryTensor)),
    ):
        assert not array.flags.owndata and not array.flags.writeable
    file = SafetensorsFile(folder / "model.safetensors")
    assert all(info.start % 32 == 0 for info in file.tensors.values() if info.dtype == "U32")
    with safe_open(folder / "model.safetensors", "np") as theirs:
        assert set(theirs.keys()) == set(file.tensors)


def test_head_bits_on_writing_equal_those_on_reading(tmp_path: Path) -> None:
    wrote = hf_folder.write(tmp_path / "hf", tie_word_embeddings=True)
    folder = write_native(read_weights(wrote.path), wrote.config, tmp_path / "native", head_bits=6)
    native = read_weights(folder)
    expected = quantize_rows(wrote.floats["model.embed_tokens.weight"], 6)
    assert isinstance(native.lm_head, GroupedRows) and native.lm_head.bits == 6
    assert np.array_equal(native.lm_head.codes, expected.codes)
    assert_same(native, read_weights(wrote.path, head_bits=6))
    assert_same(read_weights(folder, head_bits=6), native)


def test_scales_of_a_head_whose_codes_are_written_late(tmp_path: Path) -> None:
    """16 x 66 codes fill no multiple of 64 bytes and wait, 16 x 2 scales do; they are known only behind the codes."""
    weights = random_weights(tiny_config(vocab_size=16, hidden_size=66), head="float32")
    folder = write_native(weights, config_of(weights), tmp_path / "native", head_bits=8)
    found, wanted = read_weights(folder).lm_head, quantize_rows(weights.lm_head.rows(slice(None)), 8)
    assert isinstance(found, GroupedRows)
    assert np.array_equal(found.codes, wanted.codes) and np.array_equal(found.scales, wanted.scales)


def test_the_config_and_the_tokenizer_files(tmp_path: Path) -> None:
    wrote = hf_folder.write(tmp_path / "hf", auto_map={"AutoModel": "x.Model"}, is_bitnet_config=True)
    contents = {
        "tokenizer.json": b'{"a": "\xc3\xa9"}\n',
        "tokenizer_config.json": b"{}",
        "chat_template.jinja": b"{{ x }}\r\n",
        "generation_config.json": b'{"eos_token_id": [2, 9]}',
        **dict.fromkeys(
            (
                "tokenizer.model",
                "special_tokens_map.json",
                "added_tokens.json",
                "vocab.json",
                "merges.txt",
                "chat_template.json",
            ),
            b"\0any bytes\xff",
        ),
    }
    for name, content in {**contents, "modeling.py": b"import os", "pytorch_model.bin": b"x"}.items():
        (wrote.path / name).write_bytes(content)
    folder = write_native(
        read_weights(wrote.path, activations=16), wrote.config, tmp_path / "native", copy_from=wrote.path
    )
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", *contents}
    assert all((folder / name).read_bytes() == content for name, content in contents.items())
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "bitnet-mlx", "format": "words2", "format_version": 1, "activation_bits": 16, "head_bits": 16,
        "modules_to_not_convert": ["lm_head"],
    }  # fmt: skip
    assert "auto_map" not in config and "is_bitnet_config" not in config and config["rope_theta"] == 500000.0
    assert read_weights(folder).config.activation_bits == 16


def test_an_existing_folder_is_never_overwritten(tmp_path: Path) -> None:
    weights = random_weights(tiny_config())
    (tmp_path / "empty").mkdir()
    write_native(weights, config_of(weights), tmp_path / "empty")
    for name in ("empty", "file"):
        (tmp_path / "file").write_text("x")
        with pytest.raises(ConfigError, match=rf"{name} exists and is (not an empty folder|a file)"):
            write_native(weights, config_of(weights), tmp_path / name)


def _mixed(weights: DecoderWeights) -> None:
    name, linear = next(iter(weights.linears.items()))
    weights.linears[name] = replace(linear, weight=replace(linear.weight, activation_bits=16))  # type: ignore[arg-type]


def _nan(weights: DecoderWeights) -> None:
    weights.norms["model.norm"] = weights.norms["model.norm"] * np.float32("nan")


def _short(weights: DecoderWeights) -> None:
    weights.linears.popitem()


FAILURES: dict[str, tuple[Callable[[DecoderWeights], None], dict[str, Any], str]] = {
    "activation bits differ": (_mixed, {}, r"\[8, 16\] activation bits"),
    "a norm is NaN": (_nan, {}, "'model.norm.weight' holds NaN"),
    "a linear is missing": (_short, {}, "lacks 2 tensors: model.layers.1.mlp.down_proj"),
    "another rope in the config": (lambda weights: None, {"rope_theta": 5.0}, "makes rope"),
    "another size in the config": (lambda weights: None, {"intermediate_size": 99}, r"\[100\]; .*\[99\]"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_leaves_nothing_behind(tmp_path: Path, name: str) -> None:
    change, keys, text = FAILURES[name]
    weights = random_weights(tiny_config())
    change(weights)
    with pytest.raises(FormatError, match=text):
        write_native(weights, config_of(weights, **keys), tmp_path / "native")
    assert list(tmp_path.iterdir()) == []


UP = "model.layers.0.mlp.up_proj"
# Each: the tensor replaced, its new value from the old, and what the message must name.
WRONG: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray], str]] = {
    "code 3": (f"{UP}.weight", lambda a: a | np.uint32(3 << 10), f"tensor {UP}.weight in .*holds code 3 in row 0"),
    "padding": (f"{UP}.weight", lambda a: a & np.uint32(0x3FFFFFFF), "padding past column"),
    "words of 64 bits": (f"{UP}.weight", lambda a: a.astype(np.uint64), r"is U64 \[100, 8\]; U32 \[100, 8\]"),
    "unpadded": (f"{UP}.weight", lambda a: a[:, :5].copy(), r"is U32 \[100, 5\]"),
    "NaN scale": (f"{UP}.weight_scale", lambda a: a * np.float32("nan"), f"{UP}.weight_scale' holds NaN"),
    "zero scale": (f"{UP}.weight_scale", lambda a: a * 0, "must be above 0"),
    "negative scale": (f"{UP}.weight_scale", lambda a: -a, "must be above 0"),
    "scale of 64 bits": (f"{UP}.weight_scale", lambda a: a.astype(np.float64), r"F64 \[\]; F32"),
    "shape of a scale": (f"{UP}.weight_scale", lambda a: np.ones(99, np.float32), r"\[99\]; F32 \[\] or \[100\] or"),
    "head code below": ("model.embed_tokens.weight", lambda a: a - a.max() + np.int8(-1), "-128 to"),
    "head scale below 0": ("model.embed_tokens.weight_scale", lambda a: -a, "cannot be below 0"),
    "head scale NaN": ("model.embed_tokens.weight_scale", lambda a: a * np.float32("inf"), "holds NaN"),
    "head of floats": ("model.embed_tokens.weight", lambda a: a.astype(np.float32), r"F32 \[67, 72\]; I8 \[67, 72\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_damaged_native_file_is_a_named_error(tmp_path: Path, name: str) -> None:
    tensor, change, text = WRONG[name]
    weights = random_weights(tiny_config(), head="8")
    folder = write_native(weights, config_of(weights), tmp_path / "native")
    file = SafetensorsFile(folder / "model.safetensors")
    parts = [
        pending(key, change(file.array(key))) if key == tensor else pending(key, file.array(key), info.dtype)
        for key, info in file.tensors.items()
    ]
    write_safetensors(folder / "model.safetensors", parts)
    with pytest.raises(FormatError, match=text):
        read_weights(folder)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    weights = random_weights(tiny_config())
    folder = write_native(weights, config_of(weights), tmp_path / "native")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match="version 2; words2 and trits5 version 1 are read here") as caught:
        read_weights(folder)
    assert type(caught.value).__name__ == "UnsupportedModelError"


def test_reading_takes_the_results_memory_and_little_more(tmp_path: Path) -> None:
    """33 million weights: native ones stay in the file's map; master weights of 67 MB become 8 MB of words."""
    sizes: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8}
    wrote = hf_folder.write(tmp_path / "hf", storage="online", vocab_size=2000, tie_word_embeddings=True, **sizes)

    def peak(folder: Path) -> tuple[DecoderWeights, int]:
        tracemalloc.start()
        try:
            return read_weights(folder), tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    weights, online = peak(wrote.path)
    words = sum(linear.weight.nbytes for linear in weights.linears.values())
    assert words < online < words + 8e6
    write_native(weights, wrote.config, tmp_path / "native", head_bits=8)
    native = peak(tmp_path / "native")[1]
    assert native < 3e6
