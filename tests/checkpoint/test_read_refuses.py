"""read_weights on what is wrong: each fault is one named error, and random damage is never another exception."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from bitnet_mlx.checkpoint.read import read_weights
from bitnet_mlx.checkpoint.write import write_native
from bitnet_mlx.errors import BitnetError, FormatError, UnsupportedModelError
from bitnet_mlx.formats.dense import DenseRows
from bitnet_mlx.models.weights import DecoderWeights
from tests.support import hf_folder
from tests.support.same_weights import arrays

Change = Callable[[hf_folder.HFFolder], None]


def put(name: str, value: Any, dtype: mx.Dtype = mx.bfloat16) -> Change:
    def change(folder: hf_folder.HFFolder) -> None:
        folder.tensors[name] = mx.array(value).astype(dtype)

    return change


def spoil(name: str, value: float) -> Change:
    """One value of a float tensor."""

    def change(folder: hf_folder.HFFolder) -> None:
        array = np.array(folder.tensors[name].astype(mx.float32))
        array.reshape(-1)[-1] = value
        folder.tensors[name] = mx.array(array).astype(folder.tensors[name].dtype)

    return change


def drop(*names: str) -> Change:
    def change(folder: hf_folder.HFFolder) -> None:
        for name in names:
            del folder.tensors[name]

    return change


UP = "model.layers.1.mlp.up_proj"
WRONG: dict[str, tuple[str, Change, str]] = {
    "missing": ("packed", drop(f"{UP}.weight", "model.norm.weight"), rf"lacks 2 tensors: {UP}.weight, model"),
    "missing scale": ("packed", drop(f"{UP}.weight_scale"), f"lacks 1 tensors: {UP}.weight_scale"),
    "unknown": ("packed", put("model.layers.0.self_attn.q_proj.extra", [1.0]), "has 1 tensors.*q_proj.extra"),
    "a layer too many": ("packed", put("model.layers.2.input_layernorm.weight", [1.0]), "layers.2.input_layernorm"),
    "bias without its flag": ("packed", put(f"{UP}.bias", [0.0] * 100), rf"{UP}.bias"),
    "dtype": ("packed", put(f"{UP}.weight", np.zeros((25, 72)), mx.int8), r"is I8 \[25, 72\]; U8 \[25, 72\]"),
    "shape": ("packed", put(f"{UP}.weight", np.zeros((26, 72)), mx.uint8), r"is U8 \[26, 72\]; U8 \[25, 72\]"),
    "naive packing along K": ("packed", put(f"{UP}.weight", np.zeros((100, 18)), mx.uint8), r"U8 \[100, 18\]"),
    "code 3": ("packed", put(f"{UP}.weight", np.full((25, 72), 3), mx.uint8), rf"{UP}.weight.*code 3 in byte row 0"),
    "NaN scale": ("packed", put(f"{UP}.weight_scale", [float("nan")]), rf"{UP}.weight_scale' holds NaN"),
    "infinite scale": ("inverse", put(f"{UP}.weight_scale", [float("inf")]), "holds NaN or infinity"),
    "zero scale": ("packed", put(f"{UP}.weight_scale", [0.0]), "is 0.0; a scale must be above 0"),
    "negative scale": ("inverse", put(f"{UP}.weight_scale", [-2.0]), "is -2.0; a scale must be above 0"),
    "scale without an inverse": ("inverse", put(f"{UP}.weight_scale", [1e-40], mx.float32), "a scale must be above 0"),
    "shape of a scale": ("packed", put(f"{UP}.weight_scale", [1.0, 2.0]), r"BF16 \[2\]; F32 or F16 or BF16 \[1\]"),
    "integer scale": ("packed", put(f"{UP}.weight_scale", [1], mx.int32), r"I32 \[1\]"),
    "NaN norm": ("packed", spoil("model.norm.weight", float("nan")), "'model.norm.weight' holds NaN"),
    "norm of another size": ("packed", put("model.norm.weight", [1.0] * 71), r"\[71\]; .*\[72\]"),
    "infinite embedding": ("packed", spoil("model.embed_tokens.weight", float("inf")), "embed_tokens.weight' holds"),
    "NaN head": ("packed", spoil("lm_head.weight", float("nan")), "lm_head.weight' holds NaN"),
    "small vocabulary": ("packed", put("model.embed_tokens.weight", np.zeros((66, 72))), r"\[66, 72\]; .*\[67, 72\]"),
    "NaN master": ("online", spoil(f"{UP}.weight", float("nan")), f"'{UP}.weight' holds NaN"),
    "NaN float32 master": (
        "online", put(f"{UP}.weight", np.where(np.arange(7200).reshape(100, 72) == 99, np.nan, 1), mx.float32),
        f"'{UP}.weight' holds NaN",
    ),
    "packed master": ("online", put(f"{UP}.weight", np.zeros((25, 72)), mx.uint8), r"U8 \[25, 72\]; F32 or"),
    "NaN dense": ("dense", spoil(f"{UP}.weight", float("-inf")), f"'{UP}.weight' holds NaN or infinity"),
    "packed without a config": ("dense", put(f"{UP}.weight", np.zeros((25, 72)), mx.uint8), r"U8 \[25, 72\]"),
    "floats under autobitlinear": ("packed", put(f"{UP}.weight", np.full((100, 72), 0.5)), "besides -1, 0.*online"),
    "twos under autobitlinear": ("packed", put(f"{UP}.weight", np.full((100, 72), 2.0)), "besides -1, 0.*online"),
    "NaN under autobitlinear": ("packed", put(f"{UP}.weight", np.full((100, 72), np.nan)), "besides -1, 0.*online"),
    "floats under bitlinear": ("inverse", put(f"{UP}.weight", np.zeros((100, 72))), "promises packed.*online"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("shards", [1, 3])
def test_what_is_wrong_is_named_with_its_file(tmp_path: Path, name: str, shards: int) -> None:
    storage, change, text = WRONG[name]
    wrote = hf_folder.write(tmp_path, storage=storage)
    change(wrote)
    wrote.save(shards)
    with pytest.raises(FormatError, match=text) as caught:
        read_weights(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_rotated_weights_are_refused_with_the_reason(tmp_path: Path) -> None:
    wrote = hf_folder.write(tmp_path)
    put("model.layers.0.self_attn.q_proj.signs", [1.0])(wrote)
    wrote.save()
    with pytest.raises(UnsupportedModelError, match="q_proj.signs: its weights lie in a rotated .Hadamard. basis"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"quantization": {"modules": [{"name": "q_proj", "transform": "Hadamard"}]}},
        {"quantization": {"use_hadamard": True}},
        {"modules": {"q_proj": {"hadamard": {"size": 128}}}},
    ],
)
def test_a_config_that_speaks_of_a_rotation_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Also where no tensor tells of it: without the rotation the text would be fluent and wrong."""
    hf_folder.write(tmp_path, **changes)
    with pytest.raises(UnsupportedModelError, match=r"config.json: '\S*' speaks of a Hadamard rotation"):
        read_weights(tmp_path)


def test_a_rotation_that_is_switched_off_is_none(tmp_path: Path) -> None:
    hf_folder.write(tmp_path, quantization={"use_hadamard": False})
    assert read_weights(tmp_path).linears


def test_scales_of_layers_that_the_list_makes_floats(tmp_path: Path) -> None:
    hf_folder.write(tmp_path, quantization={"modules_to_not_convert": ["lm_head", "up_proj"]})
    with pytest.raises(FormatError, match=r"up_proj.weight_scale.*; modules_to_not_convert in config.json says"):
        read_weights(tmp_path)


def test_all_missing_tensors_are_listed_at_once_by_layers(tmp_path: Path) -> None:
    wrote = hf_folder.write(tmp_path, num_hidden_layers=6)
    drop(*[name for name in wrote.tensors if ".mlp." in name and ".layers.3." not in name])(wrote)
    wrote.save()
    with pytest.raises(FormatError) as caught:
        read_weights(tmp_path)
    text = str(caught.value)
    for name in ("gate_proj", "up_proj", "down_proj"):
        assert f"model.layers.*.mlp.{name}.weight_scale (layers 0-2, 4-5)" in text
    assert "such as" in text and len(text) < 2000


def test_rotary_buffers_are_harmless(tmp_path: Path) -> None:
    wrote = hf_folder.write(tmp_path)
    put("model.layers.0.self_attn.rotary_emb.inv_freq", [1.0] * 9)(wrote)
    wrote.save()
    assert len(read_weights(tmp_path).linears) == 14


@pytest.mark.parametrize("storage", ["online", "packed"])
def test_a_ternary_head_is_refused(tmp_path: Path, storage: str) -> None:
    """An explicit list that leaves the head out makes it ternary in transformers."""
    wrote = hf_folder.write(tmp_path, storage=storage, quantization={"modules_to_not_convert": ["norm"]})
    if storage == "packed":
        put("lm_head.weight_scale", [1.0])(wrote)
        wrote.save()
    with pytest.raises(UnsupportedModelError, match="so the head is ternary"):
        read_weights(tmp_path)


def test_a_float_head_that_the_list_forgot_runs_with_a_notice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hf_folder.write(tmp_path, quantization={"modules_to_not_convert": []}, tie_word_embeddings=True)
    assert isinstance(read_weights(tmp_path).lm_head, DenseRows)
    assert "leaves out lm_head" in caplog.text


def index_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "model.safetensors.index.json").read_text())


def test_missing_shards_are_named_all_at_once(tmp_path: Path) -> None:
    hf_folder.write(tmp_path, shards=4)
    for number in (2, 4):
        (tmp_path / f"model-0000{number}-of-00004.safetensors").unlink()
    with pytest.raises(
        FormatError, match=r"lacks 2 of its 4 weight files: model-00002-of-00004\.safetensors, model-00004"
    ):
        read_weights(tmp_path)


INDEX_FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "lists more": (
        lambda table: table["weight_map"].update({"x.weight": "model-00001-of-00002.safetensors"}),
        "x.weight",
    ),
    "lists less": (lambda table: table["weight_map"].pop("model.norm.weight"), "does not list.*model.norm.weight"),
    "wrong file": (
        lambda table: table["weight_map"].update({"lm_head.weight": "model-00002-of-00002.safetensors"}),
        "wrong file.*lm_head.weight",
    ),
    "outside the folder": (
        lambda table: table["weight_map"].update({"a": "../x.safetensors"}),
        r"'\.\./x.safetensors'",
    ),
    "absolute": (lambda table: table["weight_map"].update({"a": "/x.safetensors"}), "'/x.safetensors'"),
    "pickle": (lambda table: table["weight_map"].update({"a": "pytorch_model.bin"}), "'pytorch_model.bin'"),
    "no map": (lambda table: table.pop("weight_map"), "no weight_map"),
    "empty map": (lambda table: table.update(weight_map={}), "no weight_map"),
    "number for a file": (lambda table: table["weight_map"].update({"a": 5}), "into 5"),
}


@pytest.mark.parametrize("name", INDEX_FAULTS)
def test_an_index_at_odds_with_its_files(tmp_path: Path, name: str) -> None:
    change, text = INDEX_FAULTS[name]
    hf_folder.write(tmp_path, shards=2)
    table = index_of(tmp_path)
    change(table)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(table))
    with pytest.raises(FormatError, match=text):
        read_weights(tmp_path)


def test_the_same_tensor_in_two_files(tmp_path: Path) -> None:
    wrote = hf_folder.write(tmp_path, shards=2)
    table = index_of(tmp_path)["weight_map"]
    first = "model-00001-of-00002.safetensors"
    names = [name for name, file in table.items() if file == first]
    other = next(name for name, file in table.items() if file != first)
    mx.save_safetensors(str(tmp_path / first), {name: wrote.tensors[name] for name in [*names, other]})
    with pytest.raises(FormatError, match=f"'{other}' lies in .*; one place is allowed"):
        read_weights(tmp_path)


def same_or_error(folder: Path, expected: DecoderWeights) -> bool:
    """Whether reading failed; it may fail with this package's errors only, or give the expected shapes."""
    try:
        found = read_weights(folder)
    except BitnetError:
        return True
    assert arrays(found).keys() == arrays(expected).keys()
    return False


@pytest.mark.parametrize("storage", ["packed", "online", "words2"])
def test_random_damage_is_an_error_or_a_load(tmp_path: Path, storage: str) -> None:
    """Flips in the header and the data, cuts and growth: never another exception."""
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 20, "vocab_size": 8, "num_attention_heads": 2}
    first = "packed" if storage == "words2" else storage
    wrote = hf_folder.write(tmp_path / "hf", storage=first, num_hidden_layers=1, num_key_value_heads=1, **sizes)
    folder = wrote.path
    if storage == "words2":
        folder = write_native(read_weights(folder), wrote.config, tmp_path / "native", head_bits=8)
    expected = read_weights(folder)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    rng = np.random.default_rng(11)
    failed = 0
    for trial in range(400):
        damaged = bytearray(whole)
        kind = trial % 4
        if kind == 0:
            damaged = damaged[: int(rng.integers(0, len(whole)))]
        elif kind == 1:
            damaged += bytes(int(rng.integers(1, 100)))
        else:
            limit = header if kind == 2 else len(whole)
            for _ in range(int(rng.integers(1, 4))):
                damaged[int(rng.integers(0, limit))] ^= 1 << int(rng.integers(0, 8))
        path.write_bytes(damaged)
        failed += same_or_error(folder, expected)
    assert failed > 250


def test_random_damage_to_the_config(tmp_path: Path) -> None:
    hf_folder.write(tmp_path, num_hidden_layers=1)
    expected = read_weights(tmp_path)
    path = tmp_path / "config.json"
    whole = path.read_bytes()
    rng = np.random.default_rng(12)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[int(rng.integers(0, len(whole)))] = int(rng.integers(0, 256))
        path.write_bytes(damaged[: int(rng.integers(0, len(whole)))] if rng.random() < 0.2 else damaged)
        same_or_error(tmp_path, expected)
