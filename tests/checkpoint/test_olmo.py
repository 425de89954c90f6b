"""OLMo-Bitnet in its own layout: fused matrices, names and config keys of OLMo, norms without weights in all linears."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from bitnet_mlx.checkpoint.read import read_weights
from bitnet_mlx.checkpoint.write import write_native
from bitnet_mlx.errors import FormatError, UnsupportedModelError
from bitnet_mlx.formats import words2
from bitnet_mlx.ternary import TernaryTensor, ternarize
from tests.checkpoint.test_families import runs_everywhere
from tests.support.hf_folder import HFFolder
from tests.support.same_weights import assert_same

CONFIG: dict[str, Any] = {
    "model_type": "olmo", "architectures": ["OLMoForCausalLM"], "d_model": 72, "n_heads": 4, "n_layers": 2,
    "mlp_ratio": 4, "mlp_hidden_size": 200, "vocab_size": 65, "embedding_size": 67, "max_sequence_length": 64,
    "weight_tying": True, "rope": True, "alibi": False, "layer_norm_type": "rms", "activation_type": "swiglu",
    "block_type": "sequential", "include_bias": False, "eos_token_id": 2, "pad_token_id": 1,
}  # fmt: skip


def write(path: Path, norms: bool = False, dtype: mx.Dtype = mx.float32, **changes: Any) -> HFFolder:
    rng = np.random.default_rng(3)
    folder = HFFolder(path, {**CONFIG, **changes}, {})
    h, wide = 72, 200

    def put(name: str, shape: tuple[int, ...], gain: float = 0.3) -> None:
        value = gain * rng.standard_normal(shape) + (1 if len(shape) == 1 else 0)
        folder.tensors[f"model.transformer.{name}.weight"] = mx.array(value.astype(np.float32)).astype(dtype)

    put("wte", (67, h))
    for layer in range(2):
        at = f"blocks.{layer}"
        put(f"{at}.att_proj", (3 * h, h))
        # q, k and v of different sizes: one mean for all three is then another scale than one for each.
        fused = folder.tensors[f"model.transformer.{at}.att_proj.weight"]
        folder.tensors[f"model.transformer.{at}.att_proj.weight"] = mx.concatenate([fused[:h] * 3, fused[h:]])
        put(f"{at}.attn_out", (h, h))
        put(f"{at}.ff_proj", (wide, h))
        put(f"{at}.ff_out", (h, wide // 2))
        if norms:
            put(f"{at}.attn_norm", (h,))
            put(f"{at}.ff_norm", (h,))
    if norms:
        put("ln_f", (h,))
    folder.save()
    return folder


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_every_tensor(tmp_path: Path, norms: bool, dtype: mx.Dtype) -> None:
    wrote = write(tmp_path / "olmo", norms, dtype)
    weights = read_weights(wrote.path)
    assert weights.config.vocab_size == 67 and weights.config.intermediate_size == 100
    assert weights.lm_head is weights.embed_tokens and weights.config.linear_norm_eps == 1e-5
    raw = {name: np.array(value.astype(mx.float32)) for name, value in wrote.tensors.items()}
    for layer in range(2):
        at = f"model.transformer.blocks.{layer}"
        cuts = {
            "att_proj": {"self_attn.q_proj": (0, 72), "self_attn.k_proj": (72, 144), "self_attn.v_proj": (144, 216)},
            "attn_out": {"self_attn.o_proj": (0, 72)},
            # OLMo's SwiGLU gates with the second half.
            "ff_proj": {"mlp.up_proj": (0, 100), "mlp.gate_proj": (100, 200)},
            "ff_out": {"mlp.down_proj": (0, 72)},
        }
        for theirs, ours in cuts.items():
            t, scale = ternarize(raw[f"{at}.{theirs}.weight"])
            for name, (start, stop) in ours.items():
                linear = weights.layer_linear(layer, name)
                assert isinstance(linear.weight, TernaryTensor) and linear.weight.activation_bits == 8
                k = linear.weight.shape[1]
                assert np.array_equal(words2.unpack(linear.weight.words, k), t[start:stop]), name
                assert linear.weight.scale == scale and linear.norm is not None and np.all(linear.norm == 1)
        norm = raw[f"{at}.attn_norm.weight"] if norms else np.ones(72)
        assert np.array_equal(weights.layer_norm(layer, "input_layernorm"), norm)
    runs_everywhere(read_weights(wrote.path, activations=16))
    native = write_native(weights, wrote.config, tmp_path / "native")
    assert_same(read_weights(native), weights)


def test_an_untied_head_is_the_outer_ff_out(tmp_path: Path) -> None:
    wrote = write(tmp_path, weight_tying=False)
    wrote.tensors["model.transformer.ff_out.weight"] = wrote.tensors["model.transformer.wte.weight"] * 2
    wrote.save()
    weights = read_weights(tmp_path)
    head, embed = weights.lm_head.rows(slice(None)), weights.embed_tokens.rows(slice(None))
    assert np.array_equal(head, 2 * embed)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mean is subtracted": ({"layer_norm_type": "default"}, "layer_norm_type is 'default'; .*'rms'"),
    "another gate": ({"activation_type": "gelu"}, "activation_type is 'gelu'"),
    "clipped": ({"clip_qkv": 8.0}, "clip_qkv is 8.0"),
    "shared keys": ({"multi_query_attention": True}, "multi_query_attention is True"),
    "transformers' olmo": ({"d_model": None}, "of OLMo models only OLMo-Bitnet"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_graphs_are_refused(name: str, tmp_path: Path) -> None:
    changes, text = REFUSED[name]
    wrote = write(tmp_path)
    wrote.config = {key: value for key, value in {**wrote.config, **changes}.items() if value is not None}
    wrote.save()
    with pytest.raises(UnsupportedModelError, match=text):
        read_weights(tmp_path)


def test_a_fused_matrix_of_another_size_is_named(tmp_path: Path) -> None:
    wrote = write(tmp_path)
    wrote.tensors["model.transformer.blocks.1.ff_proj.weight"] = mx.zeros((198, 72))
    wrote.save()
    with pytest.raises(FormatError, match=r"lacks 2 tensors.*model.transformer.blocks.1.ff_proj.weight"):
        read_weights(tmp_path)


def test_its_pickles_are_refused_with_the_way_out(tmp_path: Path) -> None:
    wrote = write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (wrote.path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(UnsupportedModelError, match=r"pytorch_model.bin: pickles.*save_pretrained"):
        read_weights(tmp_path)
