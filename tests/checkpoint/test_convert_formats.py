"""Each target format: what it holds comes back equal, its owner reads it, and what it cannot hold is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from bitnet_mlx import convert
from bitnet_mlx.checkpoint.convert import make_target
from bitnet_mlx.checkpoint.folder import TensorTable
from bitnet_mlx.checkpoint.read import read_weights
from bitnet_mlx.checkpoint.workplace import Workplace
from bitnet_mlx.checkpoint.write import write_folder
from bitnet_mlx.errors import BitnetError, ConfigError, FormatError, UnsupportedModelError
from bitnet_mlx.formats import affine
from bitnet_mlx.formats.dense import GroupedRows, bfloat16_to_float32, float32_to_bfloat16, quantize_rows
from bitnet_mlx.models.decoder_numpy import NumpyDecoder
from bitnet_mlx.models.weights import DecoderWeights, Linear
from bitnet_mlx.ternary import TernaryTensor
from tests.checkpoint.test_families import one_bit
from tests.support import hf_folder
from tests.support.random_model import random_ternary, random_weights, tiny_config
from tests.support.same_weights import assert_same

WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
READ = ("words2", "trits5", "hf")


def logits(weights: DecoderWeights, count: int = 32) -> np.ndarray:
    decoder = NumpyDecoder(weights)
    tokens = np.random.default_rng(0).integers(0, weights.config.vocab_size, count).tolist()
    return decoder.step([tokens], [decoder.make_cache()], "all")[0]


@pytest.mark.parametrize("family", ["bitnet", "llama"])
@pytest.mark.parametrize("storage", ["packed", "inverse", "online"])
@pytest.mark.parametrize("first", READ)
def test_between_every_two_formats(tmp_path: Path, family: str, storage: str, first: str) -> None:
    wrote = hf_folder.write(tmp_path / "source", family, storage, **WIDE)
    direct = read_weights(wrote.path)
    convert(wrote.path, tmp_path / "first", first, head_bits=16)
    for second in READ:
        convert(tmp_path / "first", tmp_path / second, second, head_bits=16)
        found = read_weights(tmp_path / second)
        assert_same(found, direct)
    assert np.array_equal(logits(found), logits(direct))


def test_hf_writes_the_bytes_that_hugging_face_has(tmp_path: Path) -> None:
    """From a packed folder to words2 and back: every byte of every tensor as it was."""
    wrote = hf_folder.write(tmp_path / "source", "bitnet", "packed", **WIDE)
    convert(wrote.path, tmp_path / "words2", "words2", head_bits=16)
    convert(tmp_path / "words2", tmp_path / "hf", "hf")
    a, b = TensorTable(wrote.path), TensorTable(tmp_path / "hf")
    assert set(a) == set(b)
    for name in a:
        assert (a.info(name).dtype, a.info(name).shape) == (b.info(name).dtype, b.info(name).shape)
        assert np.array_equal(a.array(name), b.array(name)), name


def test_1bitllm_becomes_what_transformers_has_a_class_for(tmp_path: Path) -> None:
    """Its own config says llama, whose class has no sub-norms. (Run by transformers 5.24 the result differed by 1e-6.)"""
    wrote = one_bit(tmp_path / "source")
    direct = read_weights(wrote.path)
    convert(wrote.path, tmp_path / "hf", "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text(encoding="utf-8"))
    assert (config["model_type"], config["hidden_act"]) == ("bitnet", "silu")
    assert config["architectures"] == ["BitNetForCausalLM"]
    names = set(TensorTable(tmp_path / "hf"))
    assert (
        "model.layers.0.self_attn.attn_sub_norm.weight" in names and "model.layers.0.mlp.ffn_sub_norm.weight" in names
    )
    assert np.array_equal(logits(read_weights(tmp_path / "hf")), logits(direct))


@pytest.mark.parametrize("kind", ["hf", "mlx-2bit"])
def test_scales_are_rounded_only_where_that_is_asked_for(tmp_path: Path, kind: str) -> None:
    """Scales of master weights are float32; bfloat16 has 8 bits of them."""
    wrote = hf_folder.write(tmp_path / "source", "llama", "online", dtype=mx.float32, **WIDE)
    direct = read_weights(wrote.path)
    scales = {}
    for dtype in ("float32", "bfloat16"):
        done = convert(wrote.path, tmp_path / dtype, kind, dtype=dtype)
        table = TensorTable(tmp_path / dtype)
        names = {module: f"{module}.weight_scale" if kind == "hf" else f"{module}.scales" for module in done.layers}
        scales[dtype] = {module: table.array(name).reshape(-1)[0] for module, name in names.items()}
    for module, linear in direct.linears.items():
        assert isinstance(linear.weight, TernaryTensor)
        assert scales["float32"][module] == linear.weight.scale
        assert scales["bfloat16"][module] == float32_to_bfloat16(linear.weight.scale)


@pytest.mark.parametrize("head_bits", [16, 8, 6, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_stock_mlx_lm_runs_mlx_2bit_as_we_do_without_quantised_activations(
    tmp_path: Path, head_bits: int, tied: bool
) -> None:
    from mlx_lm.utils import load_model

    wrote = hf_folder.write(tmp_path / "source", "llama", "online", tie_word_embeddings=tied, vocab_size=320, **WIDE)
    done = convert(wrote.path, tmp_path / "mlx", "mlx-2bit", head_bits=head_bits, dtype="float32")
    assert done.notices[0] == "mlx-lm does not quantise activations, so its numbers differ from those of this package"
    tokens = np.random.default_rng(1).integers(0, 320, (1, 128))
    with mx.stream(mx.cpu):
        model, _ = load_model(tmp_path / "mlx")
        theirs = np.array(model(mx.array(tokens)))[0]
    decoder = NumpyDecoder(read_weights(wrote.path, activations=16, head_bits=head_bits))
    ours = decoder.step(tokens.tolist(), [decoder.make_cache()], "all")[0]
    assert np.abs(ours - theirs).max() < 2e-3
    assert (ours.argmax(-1) == theirs.argmax(-1)).mean() >= 0.99


@pytest.mark.parametrize("newer", [False, True, "beside an older one"])
def test_mlx_lm_is_told_the_rotary_base_in_the_spelling_that_it_reads(tmp_path: Path, newer: bool | str) -> None:
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}  # fmt: skip
    changes = {"rope_parameters": {**rope, "rope_theta": 70000.0}} if newer else {"rope_scaling": rope}
    wrote = hf_folder.write(tmp_path / "source", "llama", "packed", **WIDE, **changes)
    if newer is True:
        del wrote.config["rope_theta"]
        wrote.save()
    convert(wrote.path, tmp_path / "mlx", "mlx-2bit")
    config = json.loads((tmp_path / "mlx" / "config.json").read_text())
    assert config["rope_theta"] == (70000.0 if newer else 500000.0)
    assert config["rope_scaling"] == rope
    assert config["quantization"] == {
        "group_size": 128, "bits": 2,
        "model.embed_tokens": {"group_size": 64, "bits": 8}, "lm_head": {"group_size": 64, "bits": 8},
    }  # fmt: skip


@pytest.mark.parametrize("storage", ["packed", "online"])
def test_from_mlx_2bit_to_every_other_format(tmp_path: Path, storage: str) -> None:
    """MLX's form does not tell how activations are quantised; codes and scales are all there."""
    wrote = hf_folder.write(tmp_path / "source", "llama", storage, **WIDE)
    direct = read_weights(wrote.path)
    convert(wrote.path, tmp_path / "mlx", "mlx-2bit", head_bits=16, dtype="float32")
    for second in ("words2", "trits5", "mlx-2bit"):
        convert(tmp_path / "mlx", tmp_path / second, second, head_bits=16, dtype="float32")
        found = read_weights(tmp_path / second)
        for module, linear in direct.linears.items():
            a, b = linear.weight, found.linears[module].weight
            assert isinstance(a, TernaryTensor) and isinstance(b, TernaryTensor)
            assert np.array_equal(a.words, b.words) and np.all(b.scale == a.scale)
        assert np.array_equal(found.lm_head.rows(slice(None)), direct.lm_head.rows(slice(None)))


def qwen3(**options: Any) -> DecoderWeights:
    config = tiny_config(
        model_type="qwen3", sub_norms=False, qk_norms=True, hidden_act="silu", tie_word_embeddings=False,
        hidden_size=128, intermediate_size=256, head_dim=64, activation_bits=16,
    )  # fmt: skip
    weights = random_weights(config, **options)
    _float_activations(weights)
    return weights


@pytest.mark.parametrize("scale", ["tensor", "group"])
@pytest.mark.parametrize("ternary_tables", [False, True])
def test_mlx_lm_runs_qwen3_with_ternary_embeddings_too(tmp_path: Path, scale: str, ternary_tables: bool) -> None:
    from mlx_lm.utils import load_model

    weights = qwen3(scale=scale, head="float32")
    if ternary_tables:
        rng = np.random.default_rng(3)
        weights.embed_tokens = random_ternary(rng, 67, 128, "group", 16)
        weights.lm_head = random_ternary(rng, 67, 128, "group", 16)
    write(weights, tmp_path / "mlx", "mlx-2bit", head_bits=None if ternary_tables else 16, dtype="float32")
    tokens = np.random.default_rng(1).integers(0, 67, (1, 48))
    with mx.stream(mx.cpu):
        theirs = np.array(load_model(tmp_path / "mlx")[0](mx.array(tokens)))[0]
    decoder = NumpyDecoder(weights)
    ours = decoder.step(tokens.tolist(), [decoder.make_cache()], "all")[0]
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(ours).max()
    again = read_weights(tmp_path / "mlx")
    decoder = NumpyDecoder(again)
    assert (
        np.abs(decoder.step(tokens.tolist(), [decoder.make_cache()], "all")[0] - ours).max() < 1e-4 * np.abs(ours).max()
    )


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_packed_heads_are_what_mlx_unpacks(bits: int) -> None:
    """With scales that are powers of two MLX's arithmetic is exact, so every code shows."""
    rows = quantize_rows(np.random.default_rng(0).standard_normal((5, 192)).astype(np.float32), bits)
    rows = replace(rows, scales=np.exp2(np.rint(np.log2(rows.scales))))
    words = affine.pack(rows.codes, bits)
    biases = rows.scales * np.float32(-(1 << (bits - 1)))
    with mx.stream(mx.cpu):
        found = mx.dequantize(mx.array(words), mx.array(rows.scales), mx.array(biases), group_size=64, bits=bits)
        assert np.array_equal(np.array(found), rows.rows(slice(None)))
    assert np.array_equal(affine.unpack(words, bits), rows.codes)


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_heads_of_mlx_2bit_are_read_back(tmp_path: Path, bits: int) -> None:
    wrote = hf_folder.write(tmp_path / "source", "llama", **WIDE)
    convert(wrote.path, tmp_path / "mlx", "mlx-2bit", head_bits=bits, dtype="float32")
    found, direct = read_weights(tmp_path / "mlx"), read_weights(wrote.path, head_bits=bits)
    assert isinstance(found.lm_head, GroupedRows) and isinstance(direct.lm_head, GroupedRows)
    assert found.lm_head.bits == bits
    assert np.array_equal(found.lm_head.codes, direct.lm_head.codes)
    assert np.array_equal(found.lm_head.scales, direct.lm_head.scales)


def test_a_head_by_mlxs_own_quantiser_is_refused(tmp_path: Path) -> None:
    """Its codes run from the least value of a group to the greatest, without a zero."""
    wrote = hf_folder.write(tmp_path / "source", "llama", **WIDE)
    convert(wrote.path, tmp_path / "mlx", "mlx-2bit", dtype="float32")
    arrays = dict(mx.load(str(tmp_path / "mlx" / "model.safetensors")).items())  # type: ignore[union-attr]
    with mx.stream(mx.cpu):
        made = mx.quantize(mx.array(wrote.floats["lm_head.weight"]), group_size=64, bits=8)
        arrays |= {f"lm_head.{part}": array for part, array in zip(("weight", "scales", "biases"), made, strict=True)}
        mx.eval(list(arrays.values()))
    (tmp_path / "mlx" / "model.safetensors").unlink()
    mx.save_safetensors(str(tmp_path / "mlx" / "model.safetensors"), arrays)
    with pytest.raises(FormatError, match="is not -128 times the scale everywhere"):
        read_weights(tmp_path / "mlx")


def test_codes_and_scales_that_no_head_of_ours_has_are_refused(tmp_path: Path) -> None:
    wrote = hf_folder.write(tmp_path / "source", "llama", **WIDE)
    convert(wrote.path, tmp_path / "mlx", "mlx-2bit", dtype="float32")
    file = tmp_path / "mlx" / "model.safetensors"
    right: dict[str, Any] = {name: np.array(array) for name, array in mx.load(str(file)).items()}  # type: ignore[union-attr]
    words = right["lm_head.weight"].copy()
    words.view(np.uint8)[3, 7] = 0
    flipped = {part: -right[f"lm_head.{part}"] for part in ("scales", "biases")}
    for changes, message in (
        ({"weight": words}, "holds the code 0, which stands for -128"),
        (flipped, "is not -128 times"),
    ):
        file.unlink()
        tensors = right | {f"lm_head.{part}": array for part, array in changes.items()}
        mx.save_safetensors(str(file), {name: mx.array(array) for name, array in tensors.items()})
        with pytest.raises(FormatError, match=message):
            read_weights(tmp_path / "mlx")


@pytest.mark.parametrize("scale", ["tensor", "row", "group"])
@pytest.mark.parametrize("width", [128, 192, 320])
def test_packed_weights_are_what_mlx_unpacks(scale: str, width: int) -> None:
    w = random_ternary(np.random.default_rng(0), 6, width, scale)
    group = affine.group_for({width})
    assert group == (128 if width == 128 else 64)
    scales = affine.ternary_scales(w.scale, w.shape, group)
    with mx.stream(mx.cpu):
        arrays = (mx.array(affine.ternary_words(w.words, width)), mx.array(scales), mx.array(-scales))
        assert np.array_equal(np.array(mx.dequantize(*arrays, group_size=group, bits=2)), w.rows(slice(None)))
    assert np.array_equal(affine.words2(affine.ternary_words(w.words, width), width), w.words)


def llama(**changes: Any) -> DecoderWeights:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    options = {"model_type": "llama", "sub_norms": False, "hidden_act": "silu", "tie_word_embeddings": False, **sizes}
    return random_weights(tiny_config(**options), **changes)


def write(weights: DecoderWeights, path: Path, kind: str, **options: Any) -> dict[str, Any]:
    c = weights.config
    names = (
        "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "max_position_embeddings",
    )  # fmt: skip
    biased = any(linear.bias is not None for linear in weights.linears.values())
    source = {**{name: getattr(c, name) for name in names}, "attention_bias": biased, "mlp_bias": biased}
    texts = path.parent.parent / f"{path.parent.name}-texts"
    texts.mkdir()
    (texts / "config.json").write_text(json.dumps(source))
    target = make_target(weights, texts, kind, options.get("head_bits"), options.get("dtype"))
    with Workplace(path) as place:
        write_folder(weights, target, place.path)
        place.publish()
    return json.loads((path / "config.json").read_text())


@pytest.mark.parametrize("scale", ["tensor", "row", "group"])
@pytest.mark.parametrize("dense", [(), ("mlp.up_proj",)])
def test_mlx_2bit_holds_every_granularity_biases_and_float_layers(
    tmp_path: Path, scale: str, dense: tuple[str, ...]
) -> None:
    from mlx_lm.utils import load_model

    weights = llama(scale=scale, bias=True, dense=dense, head="float32")
    for name, linear in weights.linears.items():
        if isinstance(linear.weight, TernaryTensor):
            weights.linears[name] = replace(linear, weight=replace(linear.weight, activation_bits=16))
    weights.config = replace(weights.config, activation_bits=16)
    write(weights, tmp_path / "mlx", "mlx-2bit", head_bits=16, dtype="float32")
    tokens = np.random.default_rng(1).integers(0, 67, (1, 24))
    with mx.stream(mx.cpu):
        theirs = np.array(load_model(tmp_path / "mlx")[0](mx.array(tokens)))[0]
    decoder = NumpyDecoder(weights)
    ours = decoder.step(tokens.tolist(), [decoder.make_cache()], "all")[0]
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(ours).max()


def _tiny_scale(weights: DecoderWeights) -> None:
    name, linear = next(iter(weights.linears.items()))
    assert isinstance(linear.weight, TernaryTensor)
    small = replace(linear.weight, scale=np.float32(1e-9).reshape(()))
    weights.linears[name] = replace(linear, weight=small)


def _ternary_head(weights: DecoderWeights) -> None:
    weights.lm_head = random_ternary(np.random.default_rng(0), 67, 128, "group")


def _float_activations(weights: DecoderWeights) -> None:
    for name, linear in weights.linears.items():
        assert isinstance(linear.weight, TernaryTensor)
        weights.linears[name] = Linear(replace(linear.weight, activation_bits=16))


def _two_sizes_of_head(weights: DecoderWeights) -> None:
    values = np.random.default_rng(0).standard_normal((67, 128)).astype(np.float32)
    weights.embed_tokens, weights.lm_head = quantize_rows(values, 6), quantize_rows(values, 4)


def _one_norm(weights: DecoderWeights) -> None:
    name, linear = next(iter(weights.linears.items()))
    weights.linears[name] = replace(linear, norm=np.ones(linear.weight.shape[1], np.float32))


REFUSED: dict[str, tuple[str, dict[str, Any], Any, dict[str, Any], str]] = {
    "row scales": ("hf", {"scale": "row"}, None, {}, r"q_proj has a scale for each row; this layout has one"),
    "group scales": ("hf", {"scale": "group"}, None, {}, "a scale for each group of 128 columns"),
    "biases": ("hf", {"bias": True}, None, {}, "q_proj has a bias, which transformers multiplies by the scale"),
    "ternary head": ("hf", {}, _ternary_head, {}, "lm_head is ternary"),
    "float activations": ("hf", {}, _float_activations, {}, "activations that are not quantised"),
    "head bits": ("hf", {}, None, {"head_bits": 8}, "head_bits is 8; --format hf holds"),
    "bits that no head has": ("mlx-2bit", {}, None, {"head_bits": 5}, r"\[convert\] head_bits is 5; 16, 8, 6 or 4"),
    "a scale below float16": ("mlx-2bit", {}, _tiny_scale, {"dtype": "float16"}, "float16 cannot hold.*float32"),
    "words2 with heads of two sizes": ("words2", {}, _two_sizes_of_head, {}, r"embedding and head have \[4, 6\] bits"),
    "words2 with one norm": ("words2", {}, _one_norm, {}, "q_proj has a norm of its own and .* has none"),
    "mlx-2bit with a norm": ("mlx-2bit", {}, _one_norm, {}, "q_proj has a norm of its own, which mlx-lm"),
    "hf-float with a norm": ("hf-float", {}, _one_norm, {}, "q_proj has a norm of its own, which transformers"),
    "words2 with a ternary head alone": ("words2", {}, _ternary_head, {}, "ternary"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_format_cannot_hold_is_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    kind, options, change, chosen, text = REFUSED[name]
    weights = llama(**options)
    if change:
        change(weights)
    with pytest.raises((FormatError, ConfigError), match=text):
        write(weights, tmp_path / "out", kind, **chosen)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("family", "kind", "changes", "error", "text"),
    [
        ("bitnet", "mlx-2bit", WIDE, UnsupportedModelError, "no bitnet model with sub-norms with 2-bit layers"),
        ("llama", "mlx-2bit", {}, FormatError, r"\[72, 100\] columns; MLX's 2-bit layout needs a multiple of 64"),
        ("llama", "hf", {"intermediate_size": 102}, FormatError, "102 rows, no multiple of 4"),
        ("llama", "gguf", {}, ConfigError, "format is 'gguf'"),
    ],
)
def test_families_and_shapes_that_a_format_lacks(
    tmp_path: Path, family: str, kind: str, changes: dict[str, Any], error: type[BitnetError], text: str
) -> None:
    wrote = hf_folder.write(tmp_path / "source", family, **changes)
    with pytest.raises(error, match=text):
        convert(wrote.path, tmp_path / "out", kind)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_quantised_head_becomes_floats_in_hf_and_that_is_said(tmp_path: Path) -> None:
    wrote = hf_folder.write(tmp_path / "source", **WIDE)
    convert(wrote.path, tmp_path / "words2")
    done = convert(tmp_path / "words2", tmp_path / "hf", "hf")
    assert done.notices[:-1] == ["embedding and head are stored in 8 bits; they are written as bfloat16"]
    stored = read_weights(tmp_path / "words2").embed_tokens
    assert isinstance(stored, GroupedRows)
    found = TensorTable(tmp_path / "hf").array("model.embed_tokens.weight")
    assert np.array_equal(
        bfloat16_to_float32(found), bfloat16_to_float32(float32_to_bfloat16(stored.rows(slice(None))))
    )


def test_dtype_casts_what_stays_floats(tmp_path: Path) -> None:
    wrote = hf_folder.write(tmp_path / "source", "llama", "online", dtype=mx.float32, **WIDE)
    convert(wrote.path, tmp_path / "out", "words2", head_bits=16, dtype="bfloat16")
    table = TensorTable(tmp_path / "out")
    wanted = float32_to_bfloat16(wrote.floats["lm_head.weight"])
    assert np.array_equal(table.array("lm_head.weight"), wanted)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(ConfigError, match="65504"):
        convert(hf_folder.write(tmp_path / "bitnet").path, tmp_path / "b", "words2", dtype="float16")
