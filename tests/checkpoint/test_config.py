"""config.json: transformers' own classes are the oracle for defaults, rope spellings and modules_to_not_convert."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitnet_mlx.errors import BitnetError, FormatError, UnsupportedModelError
from bitnet_mlx.models.config import RopeConfig, inverse_frequencies
from bitnet_mlx.models.hf_config import parse_config
from tests.support.versions import installed

BASE: dict[str, Any] = {
    "vocab_size": 200000, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3,
    "num_attention_heads": 4,
}  # fmt: skip


def config(family: str = "bitnet", **changes: Any) -> dict[str, Any]:
    """changes: None removes a key; wrap null in a list of one to keep it: [None]."""
    table = {**BASE, "model_type": family, **changes}
    return {key: None if value == [None] else value for key, value in table.items() if value is not None}


def transformers_config(table: dict[str, Any]) -> Any:
    import transformers

    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    classes = {
        "bitnet": transformers.BitNetConfig, "llama": transformers.LlamaConfig, "qwen3": transformers.Qwen3Config
    }  # fmt: skip
    plain = {key: value for key, value in json.loads(json.dumps(table)).items() if key != "model_type"}
    return classes[table["model_type"]](**plain)


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
ACCEPTED: dict[str, dict[str, Any]] = {
    "silent": {},
    "old theta": {"rope_theta": 1234.5},
    "new theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 1234.5}},
    "both thetas": {"rope_theta": 5.0, "rope_parameters": {"rope_type": "default", "rope_theta": 1234.5}},
    "new without a kind": {"rope_parameters": {"rope_theta": 77.0}},
    "null scaling": {"rope_theta": 9.0, "rope_scaling": [None]},
    "old linear, type": {"rope_theta": 9.0, "rope_scaling": {"type": "linear", "factor": 2}},
    "old linear, rope_type": {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
    "both kinds": {"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 2.0}},
    "old llama3": {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "new llama3": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
    "old yarn": {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", **YARN}},
    "new yarn": {
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, "truncate": False, "beta_fast": 16, **YARN}
    },
    "yarn of the context": {"rope_scaling": {"type": "yarn", "factor": 2.0}, "max_position_embeddings": 64},
    "kv heads": {"num_key_value_heads": 2},
    "null kv heads": {"num_key_value_heads": [None]},
    "tied": {"tie_word_embeddings": True},
    "eos list": {"eos_token_id": [7, 8]},
    "eps": {"rms_norm_eps": 1e-3},
    "context": {"max_position_embeddings": 99},
}


@pytest.mark.parametrize("family", ["bitnet", "llama", "qwen3"])
@pytest.mark.parametrize("name", ACCEPTED)
def test_the_values_are_those_of_transformers(name: str, family: str) -> None:
    # BitNetConfig assumes the 2B model's 5 where the key is absent, whatever the number of heads; here it is the heads.
    table = config(family, **{"num_key_value_heads": 4, **ACCEPTED[name]})
    ours, theirs = parse_config(table).decoder, transformers_config(table)
    for key in ("hidden_size", "num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "hidden_act",
                "tie_word_embeddings", "bos_token_id", "vocab_size"):  # fmt: skip
        assert getattr(ours, key) == getattr(theirs, key), key
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 32)
    eos = theirs.eos_token_id
    assert ours.eos_token_ids == tuple(eos if isinstance(eos, list) else [eos] if eos is not None else [])
    rope = {"type": "default", **theirs.rope_parameters}
    assert ours.rope.rope_type == rope["rope_type"]
    for key, value in asdict(ours.rope).items():
        if key in rope and value != getattr(RopeConfig(), key):
            assert value == rope[key], key
    assert ours.rope.rope_theta == rope["rope_theta"]
    if rope["rope_type"] in ("llama3", "yarn"):
        assert ours.rope.original_max_position_embeddings == rope["original_max_position_embeddings"]


@pytest.mark.parametrize(
    ("old", "new"), [("old theta", "new theta"), ("old llama3", "new llama3"), ("old linear, type", "new linear")]
)
def test_both_spellings_give_the_same_frequencies(old: str, new: str) -> None:
    spelled = {**ACCEPTED, "new linear": {"rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 9.0}}}
    a, b = (inverse_frequencies(parse_config(config(**spelled[name])).decoder) for name in (old, new))
    assert np.array_equal(a[0], b[0]) and a[1] == b[1]
    assert not np.array_equal(a[0], inverse_frequencies(parse_config(config()).decoder)[0])


def test_head_dim_is_never_derived_where_it_is_given() -> None:
    given = parse_config(config("llama", head_dim=64)).decoder
    assert given.head_dim == 64 and given.linear_shapes()["self_attn.o_proj"] == (128, 256)
    assert parse_config(config("llama", head_dim=[None])).decoder.head_dim == 32


def test_biases_are_those_of_the_family() -> None:
    llama = parse_config(config("llama", attention_bias=True, mlp_bias=True))
    assert llama.has_bias("self_attn.o_proj") and llama.has_bias("mlp.up_proj")
    bitnet = parse_config(config("bitnet", attention_bias=True, mlp_bias=True))
    assert bitnet.has_bias("self_attn.q_proj") and not bitnet.has_bias("mlp.up_proj")


def test_tokens_of_another_vocabulary_are_not_assumed() -> None:
    assert parse_config(config(vocab_size=100)).decoder.eos_token_ids == ()
    assert parse_config(config(vocab_size=100)).decoder.bos_token_id is None
    first = parse_config(config("bitnet", vocab_size=128000)).decoder  # its tokens are 128000 and 128001
    second = parse_config(config("bitnet", vocab_size=128001)).decoder
    assert (first.bos_token_id, second.bos_token_id, second.eos_token_ids) == (None, 128000, ())
    none = parse_config(config(eos_token_id=-1, bos_token_id=-1, pad_token_id=-1)).decoder
    assert (none.eos_token_ids, none.bos_token_id, none.pad_token_id) == ((), None, None)
    assert parse_config(config(eos_token_id=[None])).decoder.eos_token_ids == ()


def test_dtype_in_all_spellings() -> None:
    assert parse_config(config(torch_dtype="float32")).decoder.dtype == "float32"
    assert parse_config(config(dtype="float16", torch_dtype="float32")).decoder.dtype == "float16"
    assert parse_config(config(torch_dtype="torch.bfloat16")).decoder.dtype == "bfloat16"


def test_every_missing_key_is_listed_at_once() -> None:
    with pytest.raises(FormatError) as caught:
        parse_config({"model_type": "bitnet", "num_hidden_layers": 2}, "somewhere/config.json")
    text = str(caught.value)
    assert "somewhere/config.json" in text
    assert all(key in text for key in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"))


# Each: changes, the error's class, and what the message must name.
REFUSED: dict[str, tuple[dict[str, Any], type[BitnetError], str]] = {
    "no family": ({"model_type": None}, UnsupportedModelError, "model_type is None; bitnet, llama, qwen3"),
    "unknown family": ({"model_type": "mamba"}, UnsupportedModelError, "'mamba'"),
    "known and not run": ({"model_type": "minicpm4"}, UnsupportedModelError, "'minicpm4'.*BitCPM"),
    "sliding window": (
        {"model_type": "qwen3", "use_sliding_window": True}, UnsupportedModelError, "use_sliding_window is True"
    ),
    "sliding layers": ({"layer_types": ["sliding_attention"]}, UnsupportedModelError, "layer_types"),
    "1bitLLM of other bits": (
        {"architectures": ["BitnetForCausalLM"], "weight_bits": 2}, UnsupportedModelError, "weight_bits is 2"
    ),
    "1bitLLM of other activations": ({"weight_bits": 1, "input_bits": 4}, UnsupportedModelError, "input_bits is 4"),
    "family is a list": ({"model_type": ["llama"]}, UnsupportedModelError, "model_type"),
    "model_file": ({"model_file": "modeling.py"}, UnsupportedModelError, "'modeling.py'; code"),
    "text as size": ({"hidden_size": "128"}, FormatError, "hidden_size is '128'"),
    "fraction as size": ({"num_hidden_layers": 2.0}, FormatError, "num_hidden_layers is 2.0"),
    "true as size": ({"num_attention_heads": True}, FormatError, "num_attention_heads is True"),
    "zero": ({"intermediate_size": 0}, FormatError, "intermediate_size is 0"),
    "negative": ({"vocab_size": -5}, FormatError, "vocab_size is -5"),
    "layers without end": ({"num_hidden_layers": 10**12}, FormatError, "num_hidden_layers is 1000000000000"),
    "too wide for exact sums": ({"intermediate_size": 200_000}, FormatError, "from 1 to 131072"),
    "kv heads do not divide": ({"num_key_value_heads": 3}, FormatError, "num_key_value_heads is 3"),
    "heads do not divide": ({"num_attention_heads": 3}, FormatError, "num_attention_heads is 3"),
    "odd head_dim": ({"head_dim": 31}, FormatError, "head_dim is 31"),
    "heads too wide together": (
        {"num_attention_heads": 2048, "head_dim": 128}, FormatError, "head_dim is 128 with 2048 heads; .*131072 columns"
    ),
    "zero eps": ({"rms_norm_eps": 0}, FormatError, "rms_norm_eps is 0"),
    "eps beyond floats": ({"rms_norm_eps": 1e301}, FormatError, "rms_norm_eps"),
    "text as flag": ({"tie_word_embeddings": "yes"}, FormatError, "tie_word_embeddings is 'yes'"),
    "eos is a text": ({"eos_token_id": "</s>"}, FormatError, "eos_token_id is '</s>'"),
    "activation": ({"hidden_act": "gelu"}, UnsupportedModelError, "hidden_act is 'gelu'; relu2 and silu"),
    "dtype": ({"torch_dtype": "float8"}, UnsupportedModelError, "torch_dtype is 'float8'"),
    "rope kind": ({"rope_scaling": {"type": "dynamic", "factor": 2}}, UnsupportedModelError, "'dynamic'; default"),
    "longrope": ({"rope_parameters": {"rope_type": "longrope"}}, UnsupportedModelError, "'longrope'"),
    "rope by layer": (
        {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, UnsupportedModelError, "'full_attention'"
    ),
    "rope is a list": ({"rope_scaling": [1]}, FormatError, r"rope_scaling is \[1\]"),
    "partial rope": ({"partial_rotary_factor": 0.5}, UnsupportedModelError, "partial_rotary_factor"),
    "negative theta": ({"rope_theta": -1.0}, FormatError, "rope_theta is -1.0"),
    "linear without factor": ({"rope_scaling": {"type": "linear"}}, FormatError, "rope_scaling lacks factor"),
    "llama3 without its keys": (
        {"rope_scaling": {"rope_type": "llama3"}}, FormatError, "lacks factor, low_freq_factor, high_freq_factor"
    ),
    "llama3 upside down": (
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1}}, FormatError, "high_freq_factor is 1"
    ),
    "yarn without factor": ({"rope_scaling": {"type": "yarn"}}, FormatError, "lacks factor"),
    "yarn on a base of 1": (
        {"rope_theta": 1, "rope_scaling": {"type": "yarn", **YARN}}, FormatError, "rope_theta is 1.0; yarn needs a base above 1"
    ),
    "mlx bits": ({"quantization": {"bits": 1, "group_size": 16}}, UnsupportedModelError, "'bits': 1.*supported are"),
    "mlx 7 bits": ({"quantization": {"bits": 7, "group_size": 64}}, UnsupportedModelError, "'bits': 7.*supported are"),
    "mlx groups of 32": (
        {"quantization": {"bits": 2, "group_size": 32}}, UnsupportedModelError, "'group_size': 32.*groups of 64 or 128"
    ),
    "mlx floats of 4 bits": (
        {"quantization": {"bits": 2, "group_size": 64, "mode": "mxfp4"}}, UnsupportedModelError, "'mxfp4'"
    ),
    "mlx with another head": (
        {"quantization": {"bits": 2, "group_size": 64, "lm_head": {"bits": 6, "group_size": 32}}},
        UnsupportedModelError, "'lm_head' is quantised otherwise",
    ),
    "compressed": ({"compression_config": {"format": "int-quantized"}}, UnsupportedModelError, "compression_config is"),
    "gptq": ({"quantization_config": {"quant_method": "gptq"}}, UnsupportedModelError, "'gptq'; supported are"),
    "no method": ({"quantization_config": {"bits": 4}}, UnsupportedModelError, "quant_method is None"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_the_keys_name(name: str) -> None:
    changes, kind, text = REFUSED[name]
    with pytest.raises(kind, match=text):
        parse_config(config(**changes))


def quantized(**table: Any) -> dict[str, Any]:
    return config(quantization_config={"quant_method": "bitnet", **table})


def test_scale_direction_follows_linear_class_alone() -> None:
    for family in ("bitnet", "llama"):
        for table, storage, divide in (
            ({}, "packed", True),
            ({"linear_class": "bitlinear"}, "packed", True),
            ({"linear_class": "bitlinear", "quantization_mode": "online"}, "packed", True),
            ({"linear_class": "autobitlinear"}, "packed", False),
            ({"linear_class": "autobitlinear", "quantization_mode": "online"}, "online", False),
        ):
            found = parse_config({**quantized(**table), "model_type": family}).quantization
            assert (found.storage, found.divide) == (storage, divide), (family, table)


@pytest.mark.parametrize(
    ("table", "kind", "text"),
    [
        ({"linear_class": "autobitlinear2"}, UnsupportedModelError, "linear_class is 'autobitlinear2'"),
        ({"quantization_mode": "sometimes"}, UnsupportedModelError, "quantization_mode is 'sometimes'"),
        ({"use_rms_norm": 1}, FormatError, "use_rms_norm is 1"),
        ({"use_rms_norm": True, "rms_norm_eps": -1}, FormatError, "rms_norm_eps is -1"),
        ({"modules_to_not_convert": "lm_head"}, FormatError, "modules_to_not_convert is 'lm_head'"),
        ({"modules_to_not_convert": [1]}, FormatError, "modules_to_not_convert"),
        ({"modules_to_not_convert": ["("]}, FormatError, r"'\('"),
        ({"quant_method": "bitnet-mlx", "format": "words3", "format_version": 1}, UnsupportedModelError, "'words3'"),
        ({"quant_method": "bitnet-mlx", "format": "words2", "format_version": 2}, UnsupportedModelError, "version 2"),
        ({"quant_method": "bitnet-mlx", "format": "words2"}, UnsupportedModelError, "version None"),
        (
            {"quant_method": "bitnet-mlx", "format": "words2", "format_version": 1, "head_bits": 5},
            FormatError, "head_bits is 5",
        ),
        (
            {"quant_method": "bitnet-mlx", "format": "words2", "format_version": 1, "activation_bits": 4},
            FormatError, "activation_bits is 4",
        ),
    ],
)  # fmt: skip
def test_quantisation_options_that_are_refused(table: dict[str, Any], kind: type[BitnetError], text: str) -> None:
    with pytest.raises(kind, match=text):
        parse_config(quantized(**table))


MODULES = [
    f"model.layers.{layer}.{name}"
    for layer in (0, 1, 2, 10, 11)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
] + ["lm_head"]
LISTS: dict[str, list[str] | None] = {
    "null": None,
    "empty": [],
    "full name": ["model.layers.1.mlp.up_proj"],
    "prefix": ["model.layers.1"],
    "prefix with its point": ["model.layers.1."],
    "prefix inside a word": ["model.layers.1.mlp.gate"],
    "bare suffix": ["down_proj", "lm_head"],
    "end of a word": ["proj"],
    "regular expression": [r"model\.layers\.\d\d\.mlp", "lm_head"],
    "regular expression with a choice": ["model.layers.(0|2).mlp|lm_head"],
    "star": ["model.layers.*.o_proj"],
    "empty text": [""],
}


# transformers 5.20, the last for Python 3.10, sees no boundary: model.layers.1 is model.layers.11 too. 5.24 sees one.
_NEWER = () if installed("transformers") > (5, 20) else ("prefix", "prefix inside a word")


@pytest.mark.parametrize("name", [name for name in LISTS if name not in _NEWER])
def test_modules_to_not_convert_as_transformers_reads_it(name: str) -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    entries = LISTS[name]
    ours = parse_config(quantized(modules_to_not_convert=entries)).quantization
    theirs = ["lm_head"] if entries is None else entries  # null: transformers keeps the output embedding
    assert [ours.converts(module) for module in MODULES] == [should_convert_module(m, theirs) for m in MODULES]
    missing = parse_config(quantized()).quantization
    assert missing.modules_to_not_convert is None


def test_auto_map_is_ignored_and_a_dense_model_is_told(tmp_path: Path) -> None:
    found = parse_config(config(auto_map={"AutoModel": "modeling.Model"}))
    assert found.quantization.storage == "dense" and "no quantization_config" in found.notices[0]
    lost = parse_config(config("llama", is_bitnet_config=True))
    assert lost.quantization.storage == "online" and "ternarised (absmean)" in lost.notices[0]


def test_differing_spellings_are_told() -> None:
    table = quantized()
    table |= {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}}
    found = parse_config(table)
    assert found.decoder.rope.rope_type == "linear"
    assert found.notices == ("rope_scaling and rope_parameters differ; rope_scaling is used, as transformers does",)
