"""read_weights against independently written folders, transformers' golden logits, and everything that can be wrong."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from bitnet_mlx.checkpoint.read import read_weights
from bitnet_mlx.errors import BitnetError, ConfigError, FormatError, UnsupportedModelError
from bitnet_mlx.formats import words2
from bitnet_mlx.formats.dense import DenseRows, GroupedRows, quantize_rows
from bitnet_mlx.models.decoder_numpy import NumpyDecoder
from bitnet_mlx.models.weights import DecoderWeights
from bitnet_mlx.ternary import TernaryTensor, ternarize
from tests.golden import by_hand, recipe, store
from tests.golden.cases import CASES
from tests.support import hf_folder

STORAGES = ("packed", "inverse", "online")


def arrays(weights: DecoderWeights) -> dict[str, np.ndarray]:
    """Every array of a model by a name of its own."""
    out: dict[str, np.ndarray] = {f"norm {name}": value for name, value in weights.norms.items()}
    matrices: dict[str, Any] = {name: linear.weight for name, linear in weights.linears.items()}
    matrices |= {"embed": weights.embed_tokens, "head": weights.lm_head}
    for name, w in matrices.items():
        keys = ("words", "scale") if isinstance(w, TernaryTensor) else ("codes", "scales")
        keys = ("data",) if isinstance(w, DenseRows) else keys
        out |= {f"{name} {key}": getattr(w, key) for key in keys}
    biases = {f"{name} bias": linear.bias for name, linear in weights.linears.items()}
    return out | {name: bias for name, bias in biases.items() if bias is not None}


def assert_same(a: DecoderWeights, b: DecoderWeights) -> None:
    x, y = arrays(a), arrays(b)
    assert x.keys() == y.keys()
    assert [name for name in x if x[name].dtype != y[name].dtype or not np.array_equal(x[name], y[name])] == []


def ternary(weights: DecoderWeights, module: str) -> TernaryTensor:
    weight = weights.linears[module].weight
    assert isinstance(weight, TernaryTensor)
    return weight


@pytest.mark.parametrize("family", ["bitnet", "llama"])
@pytest.mark.parametrize("storage", ["packed", "inverse"])
@pytest.mark.parametrize("scale_dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_packed_codes_and_scales(tmp_path: Path, family: str, storage: str, scale_dtype: mx.Dtype) -> None:
    """Both directions of the scale, tensor by tensor: in whole models a wrong v, gate or up scale can be invisible."""
    wrote = hf_folder.write(tmp_path, family, storage, scale_dtype=scale_dtype)
    weights = read_weights(tmp_path)
    assert len(wrote.t) == len(weights.linears) == 14
    for module, t in wrote.t.items():
        found = ternary(weights, module)
        assert np.array_equal(words2.unpack(found.words, t.shape[1]), t)
        in_file = np.array(wrote.tensors[f"{module}.weight_scale"].astype(mx.float32), np.float64)[0]
        exact = 1 / in_file if storage == "inverse" else in_file
        assert found.scale.shape == () and found.scale == np.float32(exact)
        assert abs(found.scale / wrote.scale[module] - 1) < 2**-8
        assert found.activation_bits == 8


@pytest.mark.parametrize("shape", [(), (1,), None])
def test_shapes_of_weight_scale(tmp_path: Path, shape: tuple[int, ...] | None) -> None:
    """[], [1] and one for each row."""
    wrote = hf_folder.write(tmp_path, storage="inverse")
    module = "model.layers.1.mlp.up_proj"
    values = np.random.default_rng(0).uniform(2, 5, (100,) if shape is None else shape).astype(np.float32)
    wrote.tensors[f"{module}.weight_scale"] = mx.array(values)
    wrote.save()
    scale = ternary(read_weights(tmp_path), module).scale
    assert scale.shape == ((100,) if shape is None else ())
    assert np.array_equal(scale, (np.float32(1) / values).reshape(scale.shape))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_master_weights_are_ternarised_as_the_definition_says(tmp_path: Path, dtype: mx.Dtype) -> None:
    wrote = hf_folder.write(tmp_path, storage="online", dtype=dtype, hidden_size=516, head_dim=128, vocab_size=40)
    weights = read_weights(tmp_path)
    for module in weights.linears:
        t, m = ternarize(wrote.floats[f"{module}.weight"])
        found = ternary(weights, module)
        assert np.array_equal(found.words, words2.pack(t)) and found.scale == m


def test_a_master_tensor_of_many_blocks_and_of_ties(tmp_path: Path) -> None:
    """Values on the halves of the scale, m = 1: 0.5 and -0.5 round to 0, and 1.5 is clipped."""
    wrote = hf_folder.write(tmp_path, storage="online", dtype=mx.float32, hidden_size=64, intermediate_size=8200, head_dim=16)
    row = np.array([0.5, -0.5, 1.5, -1.5] * 16, np.float32)
    wrote.tensors["model.layers.0.mlp.up_proj.weight"] = mx.array(np.tile(row, (8200, 1)))
    wrote.save()
    found = ternary(read_weights(tmp_path), "model.layers.0.mlp.up_proj")
    assert found.scale == 1
    assert np.array_equal(words2.unpack(found.words, 64), np.tile([0, 0, 1, -1] * 16, (8200, 1)))


@pytest.mark.parametrize("storage", [*STORAGES, "dense"])
@pytest.mark.parametrize("shards", [2, 5])
def test_shards_are_the_single_file(tmp_path: Path, storage: str, shards: int) -> None:
    hf_folder.write(tmp_path / "one", storage=storage)
    hf_folder.write(tmp_path / "many", storage=storage, shards=shards)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) == shards
    assert_same(read_weights(tmp_path / "one"), read_weights(tmp_path / "many"))


def test_tied_untied_and_a_head_that_is_there_all_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    untied = read_weights(hf_folder.write(tmp_path / "untied").path)
    assert untied.lm_head is not untied.embed_tokens
    tied = hf_folder.write(tmp_path / "tied", tie_word_embeddings=True)
    weights = read_weights(tied.path)
    assert weights.lm_head is weights.embed_tokens and "lm_head.weight" not in tied.tensors
    tied.tensors["lm_head.weight"] = tied.tensors["model.embed_tokens.weight"]
    tied.save()
    assert read_weights(tied.path).lm_head.shape == (67, 72) and caplog.text == ""
    # transformers does not tie what differs.
    tied.tensors["lm_head.weight"] = tied.tensors["lm_head.weight"] * 2
    tied.save()
    both = read_weights(tied.path)
    assert both.lm_head is not both.embed_tokens and not both.config.tie_word_embeddings
    assert "lm_head.weight differs from model.embed_tokens.weight" in caplog.text
    # ... and takes the head where the embedding is absent.
    del tied.tensors["model.embed_tokens.weight"]
    tied.save()
    only = read_weights(tied.path)
    assert only.embed_tokens is only.lm_head
    assert np.array_equal(only.lm_head.rows(slice(None)), both.lm_head.rows(slice(None)))


def test_an_untied_head_that_is_missing_is_never_made_up(tmp_path: Path) -> None:
    wrote = hf_folder.write(tmp_path)
    del wrote.tensors["lm_head.weight"]
    wrote.save()
    with pytest.raises(FormatError, match=r"lm_head\.weight.*tie_word_embeddings"):
        read_weights(tmp_path)


@pytest.mark.parametrize("storage", STORAGES)
def test_biases(tmp_path: Path, storage: str) -> None:
    wrote = hf_folder.write(tmp_path, "llama", storage, attention_bias=True, mlp_bias=True)
    weights = read_weights(tmp_path)
    for module, linear in weights.linears.items():
        bias = wrote.floats[f"{module}.bias"]
        # transformers' packed AutoBitLinear multiplies the whole sum by the scale, its bias included.
        expected = bias * ternary(weights, module).scale if storage == "packed" else bias
        assert linear.bias is not None and linear.bias.dtype == np.float32 and np.array_equal(linear.bias, expected)


def test_layers_left_dense_are_used_in_place(tmp_path: Path) -> None:
    names = ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.k_proj")
    wrote = hf_folder.write(
        tmp_path, "llama", "inverse", dense=names, quantization={"modules_to_not_convert": [*names, "lm_head"]}
    )
    weights = read_weights(tmp_path)
    for name in names:
        rows = weights.linears[name].weight
        assert isinstance(rows, DenseRows) and rows.dtype == "bfloat16" and not rows.data.flags.owndata
        assert np.array_equal(rows.rows(slice(None)), wrote.floats[f"{name}.weight"])
    assert sum(isinstance(linear.weight, TernaryTensor) for linear in weights.linears.values()) == 12


def test_a_float_model_runs_as_floats_with_a_notice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hf_folder.write(tmp_path, "llama", "dense", dtype=mx.float32)
    with caplog.at_level(logging.WARNING):
        weights = read_weights(tmp_path)
    assert all(isinstance(linear.weight, DenseRows) for linear in weights.linears.values())
    assert "no quantization_config; the layers run as floats" in caplog.text


def test_ternary_values_that_were_never_packed(tmp_path: Path) -> None:
    """transformers loads floats -1, 0 and 1 with a weight_scale as well."""
    wrote = hf_folder.write(tmp_path)
    packed = read_weights(tmp_path)
    for module, t in wrote.t.items():
        wrote.tensors[f"{module}.weight"] = mx.array(t.astype(np.float32)).astype(mx.bfloat16)
    wrote.save()
    assert_same(read_weights(tmp_path), packed)


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_head_bits_quantise_embedding_and_head(tmp_path: Path, bits: int, tied: bool) -> None:
    wrote = hf_folder.write(tmp_path, vocab_size=5000, tie_word_embeddings=tied)  # several blocks
    seen: list[tuple[int, int]] = []
    weights = read_weights(tmp_path, head_bits=bits, progress=lambda done, total: seen.append((done, total)))
    name = "model.embed_tokens.weight" if tied else "lm_head.weight"
    expected = quantize_rows(wrote.floats[name], bits)
    head = weights.lm_head
    assert isinstance(head, GroupedRows) and head.bits == bits and isinstance(weights.embed_tokens, GroupedRows)
    assert np.array_equal(head.codes, expected.codes) and np.array_equal(head.scales, expected.scales)
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] == (tmp_path / "model.safetensors").stat().st_size
    assert len(seen) > 20


def test_activations_16(tmp_path: Path) -> None:
    hf_folder.write(tmp_path)
    weights = read_weights(tmp_path, activations=16)
    assert {ternary(weights, module).activation_bits for module in weights.linears} == {16}
    assert weights.config.activation_bits == 16


@pytest.mark.parametrize("options", [{"head_bits": 5}, {"head_bits": 0}, {"activations": 4}])
def test_options_that_are_refused(tmp_path: Path, options: dict[str, int]) -> None:
    hf_folder.write(tmp_path)
    with pytest.raises(ConfigError, match=f"{next(iter(options))} is"):
        read_weights(tmp_path, **options)


# bitnet-long takes the numpy decoder minutes; its storage is bitnet-online's.
@pytest.mark.parametrize("name", [name for name in CASES if name != "bitnet-long"])
def test_golden_checkpoints_of_transformers(tmp_path: Path, name: str) -> None:
    """Read from the file, each tensor equals its definition, and the decoder gives transformers' logits."""
    case, golden = CASES[name], store.load(name)
    assert recipe.write(case, tmp_path) == store.manifest()["checkpoints"][name]
    weights = read_weights(tmp_path, activations=case.activation_bits)
    expected = by_hand.weights(case)
    assert weights.config.rope == expected.config.rope
    for module, linear in expected.linears.items():
        found = weights.linears[module]
        if isinstance(linear.weight, TernaryTensor):
            assert np.array_equal(ternary(weights, module).words, linear.weight.words), module
            assert ternary(weights, module).scale == linear.weight.scale, module
        else:
            assert np.array_equal(found.weight.rows(slice(None)), linear.weight.rows(slice(None)))
        assert (found.bias is None) == (linear.bias is None)
        assert found.bias is None or linear.bias is None or np.array_equal(found.bias, linear.bias)
    decoder = NumpyDecoder(weights)
    logits = decoder.step([case.tokens], [decoder.make_cache()], "all")[0]
    apart = np.abs(logits[golden.positions] - golden.logits).max(axis=1)
    # A rounding flips a code now and then and moves the positions after it; a wrong tensor moves every position.
    assert np.median(apart) < 1e-4 and apart[0] < 2e-4, apart
    assert np.array_equal(logits.argmax(axis=1)[golden.margin > 0.5], golden.best[golden.margin > 0.5])


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
    "missing": ("packed", drop(f"{UP}.weight", "model.norm.weight"), rf"lacks 2 tensors: {UP}.weight, model.norm.weight"),
    "missing scale": ("packed", drop(f"{UP}.weight_scale"), f"lacks 1 tensors: {UP}.weight_scale"),
    "unknown": ("packed", put("model.layers.0.self_attn.q_proj.signs", [1.0]), "has 1 tensors.*q_proj.signs"),
    "a layer too many": ("packed", put("model.layers.2.input_layernorm.weight", [1.0]), "layers.2.input_layernorm"),
    "bias without its flag": ("packed", put(f"{UP}.bias", [0.0] * 100), rf"{UP}.bias"),
    "dtype": ("packed", put(f"{UP}.weight", np.zeros((25, 72)), mx.int8), rf"'{UP}.weight' is I8 \[25, 72\]; U8 \[25, 72\]"),
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
    "packed master": ("online", put(f"{UP}.weight", np.zeros((25, 72)), mx.uint8), r"U8 \[25, 72\]; F32 or"),
    "NaN dense": ("dense", spoil(f"{UP}.weight", float("-inf")), f"'{UP}.weight' holds NaN or infinity"),
    "packed without a config": ("dense", put(f"{UP}.weight", np.zeros((25, 72)), mx.uint8), r"U8 \[25, 72\]"),
    "floats under autobitlinear": ("packed", put(f"{UP}.weight", np.full((100, 72), 0.5)), "besides -1, 0 and 1.*online"),
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
    with pytest.raises(UnsupportedModelError, match="the output head is ternary"):
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
    with pytest.raises(FormatError, match="lacks 2 of its 4 weight files: model-00002-of-00004.safetensors, model-00004"):
        read_weights(tmp_path)


INDEX_FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "lists more": (lambda table: table["weight_map"].update({"x.weight": "model-00001-of-00002.safetensors"}), "x.weight"),
    "lists less": (lambda table: table["weight_map"].pop("model.norm.weight"), "does not list.*model.norm.weight"),
    "wrong file": (
        lambda table: table["weight_map"].update({"lm_head.weight": "model-00002-of-00002.safetensors"}),
        "wrong file.*lm_head.weight",
    ),
    "outside the folder": (lambda table: table["weight_map"].update({"a": "../x.safetensors"}), r"'\.\./x.safetensors'"),
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
    except BitnetError as error:
        assert str(error)
        return True
    assert arrays(found).keys() == arrays(expected).keys()
    return False


@pytest.mark.parametrize("storage", ["packed", "online"])
def test_random_damage_is_an_error_or_a_load(tmp_path: Path, storage: str) -> None:
    """Flips in the header and the data, cuts and growth: never another exception."""
    sizes = dict(hidden_size=16, intermediate_size=20, vocab_size=8, num_attention_heads=2, num_key_value_heads=1)
    hf_folder.write(tmp_path, storage=storage, num_hidden_layers=1, **sizes)
    expected = read_weights(tmp_path)
    path = tmp_path / "model.safetensors"
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
        failed += same_or_error(tmp_path, expected)
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
