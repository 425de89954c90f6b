"""convert to GGUF: gguf-py reads the file and its weights, we read it back to the last bit, and the tokenizer is in it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGUFReader, quants

from bitnet_mlx import convert
from bitnet_mlx.checkpoint.convert import make_target
from bitnet_mlx.checkpoint.folder import TensorTable
from bitnet_mlx.checkpoint.gguf_writer import GgufPending, GgufStream
from bitnet_mlx.checkpoint.read import read_weights
from bitnet_mlx.checkpoint.target_gguf import _in_float32
from bitnet_mlx.errors import BitnetError, ConfigError, FormatError, UnsupportedModelError
from bitnet_mlx.formats.dense import GroupedRows
from bitnet_mlx.models.config import RopeConfig
from bitnet_mlx.models.decoder_numpy import NumpyDecoder
from bitnet_mlx.models.weights import DecoderWeights
from bitnet_mlx.tokenizer import load_tokenizer
from bitnet_mlx.tokenizer.gguf_bpe import LLAMA3
from bitnet_mlx.tokenizer.gguf_vocabulary import vocabulary
from tests.support import hf_folder, tiny_tokenizers
from tests.support.gguf_models import permuted
from tests.support.same_weights import assert_same

WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": 421}
KINDS = ("gguf-tq1_0", "gguf-tq2_0")


def source(path: Path, family: str = "llama", storage: str = "packed", **options: Any) -> hf_folder.HFFolder:
    wrote = hf_folder.write(path, family, storage, **{**WIDE, **options})
    tiny_tokenizers.byte_level(path, settings={"chat_template": tiny_tokenizers.CHAT})
    return wrote


def logits(weights: DecoderWeights) -> np.ndarray:
    decoder = NumpyDecoder(weights)
    tokens = np.random.default_rng(0).integers(0, 421, 24).tolist()
    return decoder.step([tokens], [decoder.make_cache()], "all")[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["bitnet", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_comes_back_to_the_last_bit(tmp_path: Path, kind: str, family: str, tied: bool) -> None:
    """Scales that float16 holds, so that nothing is rounded; and from GGUF on to every other format."""
    wrote = source(tmp_path / "hf", family, scale_dtype=mx.float16, tie_word_embeddings=tied)
    file = tmp_path / "out" / "model.gguf"
    done = convert(wrote.path, file, kind, head_bits=16)
    assert done.verified and done.bytes_out == file.stat().st_size
    direct, found = read_weights(wrote.path), read_weights(file)
    assert_same(found, direct)
    assert np.array_equal(logits(found), logits(direct))
    for number, other in enumerate(("words2", "trits5", "hf", *KINDS)):
        target = tmp_path / f"{number}.gguf"
        convert(file, target, other, head_bits=16)
        assert_same(read_weights(target), direct)


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_py_reads_what_was_written(tmp_path: Path, kind: str) -> None:
    wrote = source(tmp_path / "hf", "llama", scale_dtype=mx.float16, attention_bias=True)
    convert(wrote.path, tmp_path / "m.gguf", kind, head_bits=16)
    reader = GGUFReader(tmp_path / "m.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 3 + 2 * (2 + 7 + 4)
    for name, heads in (("attn_q", 4), ("attn_k", 2), ("attn_v", 0), ("ffn_down", 0)):
        module = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
                  "ffn_down": "mlp.down_proj"}[name]  # fmt: skip
        module = f"model.layers.1.{module}"
        wanted = (wrote.t[module] * np.float32(np.float16(wrote.scale[module]))).astype(np.float32)
        wanted = permuted(wanted, heads) if heads else wanted
        tensor = tensors[f"blk.1.{name}.weight"]
        assert np.array_equal(quants.dequantize(tensor.data, tensor.tensor_type), wanted)
        if f"{module}.bias" in wrote.floats:
            # This kind of packed layer scales its bias as well.
            bias = wrote.floats[f"{module}.bias"] * np.float32(np.float16(wrote.scale[module]))
            assert np.array_equal(tensors[f"blk.1.{name}.bias"].data, permuted(bias, heads) if heads else bias)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama" and fields["general.file_type"] == 36 + KINDS.index(kind)
    assert fields["llama.attention.head_count_kv"] == 2 and fields["llama.rope.freq_base"] == 500000.0
    state = json.loads((wrote.path / "tokenizer.json").read_text())
    assert fields["tokenizer.ggml.tokens"][300] == next(t for t, i in state["model"]["vocab"].items() if i == 300)
    assert fields["tokenizer.chat_template"] == tiny_tokenizers.CHAT


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_heads_are_the_codes_with_their_scales_as_float16(tmp_path: Path, bits: int, kind: str) -> None:
    wrote = source(tmp_path / "hf")
    convert(wrote.path, tmp_path / "m.gguf", kind, head_bits=bits)
    rows = read_weights(wrote.path, head_bits=bits).lm_head
    assert isinstance(rows, GroupedRows)
    wanted = rows.codes * np.repeat(rows.scales.astype(np.float16).astype(np.float32), 64, axis=1)
    tensor = next(t for t in GGUFReader(tmp_path / "m.gguf").tensors if t.name == "output.weight")
    assert tensor.tensor_type.name == {8: "Q8_0", 4: "Q4_0"}[bits]
    assert np.array_equal(quants.dequantize(tensor.data, tensor.tensor_type), wanted)


ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}},
    "llama3": {
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ROPES)
def test_rotary_scaling_comes_back(tmp_path: Path, name: str) -> None:
    wrote = source(tmp_path / "hf", **ROPES[name])
    convert(wrote.path, tmp_path / "m.gguf", "gguf-tq2_0", head_bits=16)
    assert read_weights(tmp_path / "m.gguf").config.rope == read_weights(wrote.path).config.rope


def test_the_factor_of_yarns_attention_is_told_as_llama_cpp_reads_it(tmp_path: Path) -> None:
    """The format multiplies its own 1 + 0.1 ln factor in."""
    scaling = {**ROPES["yarn"]["rope_scaling"], "attention_factor": 1.25}
    wrote = source(tmp_path / "hf", rope_scaling=scaling)
    convert(wrote.path, tmp_path / "m.gguf", "gguf-tq2_0")
    told = GGUFReader(tmp_path / "m.gguf").fields["llama.rope.scaling.attn_factor"].contents()
    assert told == pytest.approx(1.25 / (1 + 0.1 * np.log(4)), rel=1e-6)
    assert read_weights(tmp_path / "m.gguf").config.rope.attention_factor == pytest.approx(1.25, rel=1e-6)
    wanted = RopeConfig(factor=4.0, attention_factor=1.25)
    assert _in_float32(wanted, replace(wanted, factor=4.0000001, attention_factor=1.2500001)).factor == 4.0000001
    assert _in_float32(wanted, replace(wanted, factor=4.00001)) == wanted


def test_another_llama3_scaling_is_refused_because_the_file_cannot_tell_it(tmp_path: Path) -> None:
    scaling = {**ROPES["llama3"]["rope_scaling"], "low_freq_factor": 2.0}
    wrote = source(tmp_path / "hf", rope_scaling=scaling)
    with pytest.raises(BitnetError, match=r"rope"):
        convert(wrote.path, tmp_path / "m.gguf", "gguf-tq2_0")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    "kind",
    [
        "byte level", "no bos", "sentencepiece", "sentencepiece, an end and no beginning", "more rows", "fewer rows",
        "unknown split", "Llama 3's split", "Llama 3's split, merged",
    ],
)  # fmt: skip
def test_the_tokenizer_is_in_the_file(tmp_path: Path, kind: str) -> None:
    rows = {"more rows": 450, "fewer rows": 420}.get(kind, 421)
    wrote = hf_folder.write(tmp_path / "hf", "llama", **{**WIDE, "vocab_size": rows})
    unknown = kind in ("unknown split", "Llama 3's split, merged")
    if "sentencepiece" in kind:
        ends = {"add_bos_token": False, "add_eos_token": True} if "no beginning" in kind else {}
        tiny_tokenizers.sentencepiece_model(wrote.path, settings=ends)
    else:
        tiny_tokenizers.byte_level(wrote.path, bos=kind != "no bos")
    if kind == "unknown split":
        path = wrote.path / "tokenizer.json"
        state = json.loads(path.read_text())
        digits = {"type": "Digits", "individual_digits": True}
        state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, state["pre_tokenizer"]]}
        path.write_text(json.dumps(state))
    if "Llama 3" in kind:
        path = wrote.path / "tokenizer.json"
        state = json.loads(path.read_text())
        split = {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False}
        level = {**state["pre_tokenizer"], "use_regex": False}
        state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
        state["model"]["ignore_merges"] = "merged" not in kind
        path.write_text(json.dumps(state))
    done = convert(wrote.path, tmp_path / "m.gguf", "gguf-tq2_0")
    assert any("no name in GGUF" in notice for notice in done.notices) == unknown
    assert any("left out" in notice for notice in done.notices) == (kind == "fewer rows")
    ours, theirs = load_tokenizer(wrote.path), load_tokenizer(tmp_path / "m.gguf")
    special = "not always <s> special </s><unk>"  # sentencepiece in GGUF cuts special tokens out of text
    texts = [text for text in tiny_tokenizers.TEXTS if not ("sentencepiece" in kind and text == special)]
    for text in [*texts, "12345 digits", "<|start|>user"]:
        assert theirs.encode(text) == ours.encode(text)
    assert theirs.eos_token_ids == ours.eos_token_ids
    reader = GGUFReader(tmp_path / "m.gguf")
    assert len(reader.fields["tokenizer.ggml.tokens"].contents()) == rows


def test_a_vocabulary_that_is_cut_keeps_the_merges_of_what_is_left(tmp_path: Path) -> None:
    tiny_tokenizers.byte_level(tmp_path)
    keys = vocabulary(tmp_path, 300, (), [])
    tokens = keys["tokenizer.ggml.tokens"]
    assert len(tokens) == len(keys["tokenizer.ggml.token_type"]) == 300
    merged = {merge.replace(" ", "") for merge in keys["tokenizer.ggml.merges"]}
    assert merged == set(tokens) & merged and len(merged) > 20


def test_a_beginning_that_config_json_alone_states_is_in_the_file(tmp_path: Path) -> None:
    tiny_tokenizers.byte_level(tmp_path, settings={"bos_token": None})
    tiny_tokenizers.write_json(tmp_path / "config.json", {"bos_token_id": 2})
    assert vocabulary(tmp_path, 421, (), [])["tokenizer.ggml.bos_token_id"] == 2


@pytest.mark.parametrize(
    ("family", "changes", "options", "error", "text"),
    [
        ("llama", {"intermediate_size": 384}, {}, FormatError, "384 weights; this layout needs a multiple of 256"),
        ("llama", {}, {"head_bits": 6}, ConfigError, "16, 8 or 4"),
        (
            "llama",
            {"rope_scaling": {**ROPES["yarn"]["rope_scaling"], "truncate": False}},
            {},
            FormatError,
            "mscale and truncate of YaRN have no place in GGUF",
        ),
        ("llama", {"hidden_act": "relu2"}, {}, UnsupportedModelError, "a llama model with relu2 has no architecture"),
        ("llama", {}, {"mlx_path": "folder"}, ConfigError, r"give a name with \.gguf"),
    ],
)
def test_what_gguf_cannot_hold_is_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], options: dict[str, Any], error: type[BitnetError], text: str
) -> None:
    wrote = source(tmp_path / "hf", family, **changes)
    given = {"mlx_path": tmp_path / "m.gguf", **options}
    with pytest.raises(error, match=text):
        convert(wrote.path, format="gguf-tq2_0", **given)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_no_tokenizer_no_gguf(tmp_path: Path) -> None:
    wrote = hf_folder.write(tmp_path / "hf", "llama", **WIDE)
    with pytest.raises(UnsupportedModelError, match=r"no tokenizer\.json and no tokenizer\.model"):
        convert(wrote.path, tmp_path / "m.gguf", "gguf-tq2_0")


def test_a_scale_that_float16_loses_is_refused(tmp_path: Path) -> None:
    wrote = source(tmp_path / "hf", scale_dtype=mx.float32)
    name = "model.layers.1.mlp.up_proj.weight_scale"
    wrote.tensors[name] = mx.array([1e-12])
    wrote.save()
    with pytest.raises(FormatError, match=r"blk\.1\.ffn_up\.weight scale.*float16"):
        convert(wrote.path, tmp_path / "m.gguf", "gguf-tq2_0")


def test_scales_are_rounded_to_float16(tmp_path: Path) -> None:
    wrote = source(tmp_path / "hf", storage="online", dtype=mx.float32)
    convert(wrote.path, tmp_path / "m.gguf", "gguf-tq1_0")
    direct, found = read_weights(wrote.path), read_weights(tmp_path / "m.gguf")
    for module, linear in direct.linears.items():
        assert np.array_equal(found.linears[module].weight.words, linear.weight.words)  # type: ignore[union-attr]
        assert found.linears[module].weight.scale == linear.weight.scale.astype(np.float16)  # type: ignore[union-attr]


def test_a_file_is_replaced_only_with_force(tmp_path: Path) -> None:
    wrote = source(tmp_path / "hf")
    convert(wrote.path, tmp_path / "m.gguf", "gguf-tq1_0")
    before = (tmp_path / "m.gguf").read_bytes()
    with pytest.raises(ConfigError, match=r"exists and is a file.*--force"):
        convert(wrote.path, tmp_path / "m.gguf", "gguf-tq2_0")
    assert (tmp_path / "m.gguf").read_bytes() == before
    convert(wrote.path, tmp_path / "m.gguf", "gguf-tq2_0", force=True)
    assert (tmp_path / "m.gguf").read_bytes() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "m.gguf"]


def test_a_bias_in_one_layer_alone_is_refused(tmp_path: Path) -> None:
    weights = read_weights(source(tmp_path).path)
    target = make_target(weights, tmp_path, "gguf-tq2_0", None, None)
    module = "model.layers.1.self_attn.q_proj"
    linear = replace(weights.linears[module], bias=np.zeros(256, np.float32))
    with pytest.raises(FormatError, match=f"{module} and the same linear of layer 0 differ in having a bias"):
        target.linear(module, linear)


def test_the_writer_refuses_what_was_not_announced(tmp_path: Path) -> None:
    def one(name: str, size: int, given: int) -> GgufPending:
        return GgufPending(name, "F32", (size,), lambda: [np.zeros(given, np.float32)])

    for tensors, text in (
        ([one("a", 3, 3)], "1 tensors never came, such as b"),
        ([one("a", 3, 3), one("a", 3, 3)], "was not to be written, or was before"),
        ([one("c", 3, 3)], "was not to be written"),
        ([one("a", 3, 2)], "8 bytes came"),
    ):
        with pytest.raises(FormatError, match=text):  # noqa: SIM117
            with GgufStream(tmp_path / "m.gguf", {"general.architecture": "x"}, [("a", (3,)), ("b", (2,))]) as file:
                for tensor in tensors:
                    file.add(tensor)
        assert list(tmp_path.iterdir()) == []


def test_the_source_is_left_as_it_was(tmp_path: Path) -> None:
    wrote = source(tmp_path / "hf")
    names = set(TensorTable(wrote.path))
    before = {path.name: path.read_bytes() for path in wrote.path.iterdir()}
    convert(wrote.path, tmp_path / "m.gguf", "gguf-tq1_0")
    assert {path.name: path.read_bytes() for path in wrote.path.iterdir()} == before
    assert set(TensorTable(wrote.path)) == names
