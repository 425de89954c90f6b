"""read_weights against independently written folders and transformers' golden logits."""

from __future__ import annotations

import logging
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from bitnet_mlx.checkpoint.read import read_weights
from bitnet_mlx.errors import ConfigError, FormatError
from bitnet_mlx.formats import words2
from bitnet_mlx.formats.dense import DenseRows, GroupedRows, quantize_rows
from bitnet_mlx.models.decoder_numpy import NumpyDecoder
from bitnet_mlx.models.weights import DecoderWeights
from bitnet_mlx.ternary import TernaryTensor, ternarize
from tests.golden import by_hand, recipe, store
from tests.golden.cases import CASES
from tests.support import hf_folder
from tests.support.same_weights import arrays, assert_same

STORAGES = ("packed", "inverse", "online")


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


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_a_master_tensor_of_many_blocks_and_of_ties(tmp_path: Path, dtype: mx.Dtype) -> None:
    """Values on the halves of the scale, m = 1: 0.5 and -0.5 round to 0, and 1.5 is clipped."""
    wrote = hf_folder.write(
        tmp_path, storage="online", dtype=dtype, hidden_size=64, intermediate_size=8200, head_dim=16
    )
    row = np.array([0.5, -0.5, 1.5, -1.5] * 16, np.float32)
    wrote.tensors["model.layers.0.mlp.up_proj.weight"] = mx.array(np.tile(row, (8200, 1))).astype(dtype)
    wrote.save()
    found = ternary(read_weights(tmp_path), "model.layers.0.mlp.up_proj")
    assert found.scale == 1
    assert np.array_equal(words2.unpack(found.words, 64), np.tile([0, 0, 1, -1] * 16, (8200, 1)))


def test_what_lies_at_odd_offsets_is_aligned_when_it_is_read(tmp_path: Path) -> None:
    """The format lets a header have any length."""
    wrote = hf_folder.write(tmp_path, storage="inverse", scale_dtype=mx.float32)
    before = {name: np.array(array) for name, array in arrays(read_weights(tmp_path)).items()}
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    odd = 1 + length % 2  # so that the values begin at an odd byte
    file.unlink()
    file.write_bytes((length + odd).to_bytes(8, "little") + data[8 : 8 + length] + b" " * odd + data[8 + length :])
    found = arrays(read_weights(wrote.path))
    assert all(array.flags.aligned for array in found.values())
    assert all(np.array_equal(found[name], array) for name, array in before.items())


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
    # A tensor of the same bytes and another shape is none of the model's.
    tied.tensors["lm_head.weight"] = mx.contiguous(tied.tensors["model.embed_tokens.weight"].reshape(72, 67))
    tied.save()
    with pytest.raises(FormatError, match=r"'lm_head.weight' is BF16 \[72, 67\]"):
        read_weights(tied.path)
    tied.tensors["lm_head.weight"] = tied.tensors["model.embed_tokens.weight"] * 2
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
            assert np.array_equal(found.weight.rows(slice(None)), linear.weight.rows(slice(None))), module
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
