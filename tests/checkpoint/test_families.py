"""Small folders in the published form of each family: config.json, tensor names and storage as formats have them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from bitnet_mlx.api import embedded_model, load
from bitnet_mlx.checkpoint.census import take_census
from bitnet_mlx.checkpoint.read import read_weights
from bitnet_mlx.checkpoint.weigh import model_size
from bitnet_mlx.checkpoint.write import write_native
from bitnet_mlx.cli.main import main
from bitnet_mlx.errors import FormatError, UnsupportedModelError
from bitnet_mlx.formats import words2
from bitnet_mlx.formats.dense import DenseRows
from bitnet_mlx.models.weights import DecoderWeights
from bitnet_mlx.ternary import TernaryTensor, ternarize
from tests.model.engines import ENGINES, build
from tests.model.float64 import Float64
from tests.support import hf_folder
from tests.support.same_weights import assert_same

# family of the writer, its storage, and what config.json says besides sizes.
FORMS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "microsoft/bitnet-b1.58-2B-4T": ("bitnet", "packed", {
        "architectures": ["BitNetForCausalLM"], "auto_map": {"AutoModelForCausalLM": "modeling_bitnet.BitNetForCausalLM"},
        "tie_word_embeddings": True,
    }),
    "microsoft/bitnet-b1.58-2B-4T-bf16": ("bitnet", "online", {
        "architectures": ["BitNetForCausalLM"], "tie_word_embeddings": True,
    }),
    "HF1BitLLM/Llama3-8B-1.58": ("llama", "inverse", {
        "architectures": ["LlamaForCausalLM"], "is_bitnet_config": True,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 64},
    }),
    "tiiuae/Falcon3-1.58bit": ("llama", "inverse", {
        "architectures": ["LlamaForCausalLM"], "head_dim": 32, "rope_theta": 1000042, "bos_token_id": 11,
    }),
    "tiiuae/Falcon-E": ("llama", "inverse", {
        "architectures": ["LlamaForCausalLM"], "is_bitnet_config": True, "pretraining_tp": 1,
        "quantization_config": {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]},
    }),
    "tiiuae/Falcon-E, masters": ("llama", "dense", {"is_bitnet_config": True}),
}  # fmt: skip
TOKENS = [1, 5, 9, 17, 33, 2, 60, 7]


def ternary(weights: DecoderWeights, module: str) -> TernaryTensor:
    weight = weights.linears[module].weight
    assert isinstance(weight, TernaryTensor)
    return weight


def rename(folder: hf_folder.HFFolder, names: dict[str, str]) -> None:
    for old, new in names.items():
        folder.tensors = {name.replace(old, new): value for name, value in folder.tensors.items()}
    folder.save()


def write(name: str, path: Path) -> hf_folder.HFFolder:
    family, storage, changes = FORMS[name]
    return hf_folder.write(path, family, storage, **changes)


def one_bit(path: Path, **changes: Any) -> hf_folder.HFFolder:
    """1bitLLM's: model_type llama, BitNet's sub-norms under names of their own, float16 masters."""
    wrote = hf_folder.write(path, "bitnet", "dense", dtype=mx.float16, **changes)
    wrote.config |= {"model_type": "llama", "architectures": ["BitnetForCausalLM"], "weight_bits": 1, "input_bits": 8}
    wrote.config["hidden_act"] = "silu"
    rename(wrote, {"attn_sub_norm": "inner_attn_ln", "ffn_sub_norm": "ffn_layernorm"})
    return wrote


def embedding(path: Path) -> hf_folder.HFFolder:
    """bitnet-embedding-0.6b's: Qwen3 masters, a norm before each linear, saved without the prefix "model."."""
    wrote = hf_folder.write(path, "qwen3", "dense", tie_word_embeddings=True, head_dim=24, rms_norm_eps=1e-4)
    rng = np.random.default_rng(9)
    for name in [name for name in wrote.tensors if name.endswith("_proj.weight")]:
        norm = 1 + 0.3 * rng.standard_normal(wrote.tensors[name].shape[1])
        wrote.tensors[name.replace("_proj.", "_proj.norm.")] = mx.array(norm.astype(np.float32)).astype(mx.bfloat16)
    wrote.config["architectures"] = ["Qwen3Model"]
    rename(wrote, {"model.": ""})
    return wrote


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_known_families(name: str, tmp_path: Path) -> None:
    """Codes and scales by definition, and all engines near float64's logits without quantised activations."""
    wrote = write(name, tmp_path)
    weights = read_weights(tmp_path)
    assert weights.config.activation_bits == 8 and len(weights.linears) == 14
    for module in weights.linears:
        found = ternary(weights, module)
        if module in wrote.t:
            t, scale = wrote.t[module], wrote.scale[module]
        else:
            t, scale = ternarize(wrote.floats[f"{module}.weight"])
        assert np.array_equal(words2.unpack(found.words, t.shape[1]), t), module
        assert found.scale.shape == () and abs(found.scale / scale - 1) < 2**-8, module
    runs_everywhere(read_weights(tmp_path, activations=16))


def runs_everywhere(weights: DecoderWeights) -> None:
    expected = Float64(weights).logits(TOKENS)
    for engine in ENGINES:
        decoder = build(engine, weights)
        found = decoder.step([TOKENS], [decoder.make_cache()], "all")[0]
        assert np.abs(found - expected).max() < 2e-4 * expected.std(), engine


def test_head_dim_of_falcon3_is_explicit(tmp_path: Path) -> None:
    write("tiiuae/Falcon3-1.58bit", tmp_path)
    config = read_weights(tmp_path).config
    assert (config.head_dim, config.hidden_size, config.num_attention_heads) == (32, 72, 4)
    assert config.rope.rope_theta == 1000042 and config.bos_token_id == 11


def test_1bitllm_with_a_width_of_5460(tmp_path: Path) -> None:
    """K = 5460 is no multiple of 16 or 128."""
    wrote = one_bit(tmp_path / "hf", intermediate_size=5460, num_hidden_layers=1)
    weights = read_weights(wrote.path)
    assert weights.config.sub_norms and weights.config.hidden_act == "silu" and weights.config.activation_bits == 8
    norm = weights.norms["model.layers.0.mlp.ffn_sub_norm"]
    assert np.array_equal(norm, wrote.floats["model.layers.0.mlp.ffn_sub_norm.weight"])
    down = ternary(weights, "model.layers.0.mlp.down_proj")
    t, scale = ternarize(wrote.floats["model.layers.0.mlp.down_proj.weight"])
    assert down.shape == (72, 5460) and np.array_equal(words2.unpack(down.words, 5460), t) and down.scale == scale
    runs_everywhere(read_weights(wrote.path, activations=16))
    native = write_native(weights, wrote.config, tmp_path / "native")
    assert_same(read_weights(native), weights)


def test_1bitllm_without_its_norms_is_refused_by_name(tmp_path: Path) -> None:
    wrote = one_bit(tmp_path)
    del wrote.tensors["model.layers.1.self_attn.inner_attn_ln.weight"]
    wrote.save()
    with pytest.raises(FormatError, match=r"lacks 1 tensors: model.layers.1.self_attn.attn_sub_norm.weight"):
        read_weights(tmp_path)


def test_a_norm_under_both_names_is_one_too_many(tmp_path: Path) -> None:
    wrote = one_bit(tmp_path)
    theirs, ours = "model.layers.1.self_attn.inner_attn_ln.weight", "model.layers.1.self_attn.attn_sub_norm.weight"
    wrote.tensors[ours] = wrote.tensors[theirs]
    wrote.save()
    with pytest.raises(FormatError, match=f"has 1 tensors that a llama model does not know: {theirs}"):
        read_weights(tmp_path)


def test_messages_have_the_names_of_the_file(tmp_path: Path) -> None:
    wrote = one_bit(tmp_path)
    wrote.tensors["model.layers.1.self_attn.inner_attn_ln.weight"] = mx.zeros((71,))
    wrote.save()
    with pytest.raises(FormatError, match=r"'model.layers.1.self_attn.inner_attn_ln.weight' is F32 \[71\]"):
        read_weights(tmp_path)


def test_bitnet_embedding(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wrote = embedding(tmp_path / "hf")
    weights = read_weights(wrote.path)
    assert "each linear has a norm of its own" in caplog.text
    assert weights.config.qk_norms and weights.config.linear_norm_eps == 1e-4
    assert all(isinstance(linear.weight, TernaryTensor) for linear in weights.linears.values())
    norm = weights.linears["model.layers.1.mlp.down_proj"].norm
    expected = wrote.tensors["layers.1.mlp.down_proj.norm.weight"].astype(mx.float32)
    assert norm is not None and np.array_equal(norm, np.array(expected))
    runs_everywhere(read_weights(wrote.path, activations=16))
    native = write_native(weights, wrote.config, tmp_path / "native")
    again = read_weights(native)
    assert_same(again, weights)
    assert again.config.linear_norm_eps == 1e-4
    for a, b in zip(again.linears.values(), weights.linears.values(), strict=True):
        assert a.norm is not None and b.norm is not None and np.array_equal(a.norm, b.norm)
    for folder in (wrote.path, native):
        assert take_census(folder).parameters == sum(v.size for v in wrote.tensors.values())


def test_one_norm_too_few_is_named(tmp_path: Path) -> None:
    wrote = embedding(tmp_path)
    del wrote.tensors["layers.1.mlp.down_proj.norm.weight"]
    wrote.save()
    with pytest.raises(FormatError, match=r"lacks 1 tensors: model.layers.1.mlp.down_proj.norm.weight"):
        read_weights(tmp_path)


@pytest.mark.parametrize(("model_type", "reason"), [("gemma3_text", "bitnet-embedding-270m"), ("qwen3_5", "vision")])
def test_known_models_of_other_graphs(tmp_path: Path, model_type: str, reason: str) -> None:
    wrote = hf_folder.write(tmp_path, "llama", "dense")
    wrote.config["model_type"] = model_type
    wrote.save()
    with pytest.raises(UnsupportedModelError, match=rf"'{model_type}'; bitnet, .*{reason}"):
        read_weights(tmp_path)


BACKENDS = ("numpy", "cpu", "mlx")


def generated(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["generate", "--prompt", "Once upon", "--max-tokens", "40", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)["text"]


def speaking(path: Path, storage: str) -> Path:
    """A random model with the embedded model's tokenizer."""
    vocabulary = json.loads((embedded_model() / "config.json").read_text())["vocab_size"]
    hf_folder.write(path, "llama", storage, vocab_size=vocabulary)
    for file in embedded_model().glob("tokenizer*"):
        shutil.copy(file, path)
    return path


def test_activations_override_what_the_checkpoint_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(speaking(tmp_path, "online"))
    for backend in BACKENDS:
        plain, eight, sixteen = (
            generated(capsys, "--model", folder, "--backend", backend, *flags)
            for flags in ((), ("--activations", "8"), ("--activations", "16"))
        )
        assert plain == eight != sixteen
    for bits in (8, 16):
        model, _ = load(folder, backend="numpy", activations=bits)
        assert model.config.activation_bits == bits


def test_ternarize_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [speaking(tmp_path / storage, storage) for storage in ("online", "dense")]
    expected = generated(capsys, "--model", str(folders[0]))
    assert generated(capsys, "--model", str(folders[1]), "--ternarize") == expected
    assert generated(capsys, "--model", str(folders[1])) != expected


def test_sizes_before_loading_are_those_of_what_is_loaded(tmp_path: Path) -> None:
    """The memory plan's formulas see norms inside linears, other names and master weights."""
    for name, make in (("1bit", one_bit), ("embedding", embedding)):
        wrote = make(tmp_path / name)
        weights, size = read_weights(wrote.path), model_size(wrote.path)
        held = [m.host() for m in (*size.linears, size.embed, *([size.head] if size.head else []))]
        assert sum(held) + size.norms == weights.nbytes, name


def test_a_promise_of_2_bits_that_no_layer_keeps_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """MLX's table over plain floats: as in mlx-lm what has no scales is float, here with a word."""
    hf_folder.write(tmp_path, "llama", "dense")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization": {"bits": 2, "group_size": 128}}))
    assert all(isinstance(linear.weight, DenseRows) for linear in read_weights(tmp_path).linears.values())
    assert "promises layers of 2 bits, and no linear here has scales; all of them run as floats" in caplog.text
