"""DecoderWeights straight from a case's arrays, by the rules of transformers, without the package's reader."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitnet_mlx.formats import words2
from bitnet_mlx.formats.dense import DenseRows
from bitnet_mlx.models.config import DecoderConfig, RopeConfig
from bitnet_mlx.models.weights import DecoderWeights, Linear, Matrix
from bitnet_mlx.ternary import TernaryTensor
from tests.golden import recipe
from tests.golden.cases import Case


def rope(config: dict[str, Any]) -> RopeConfig:
    """Either spelling: rope_parameters, or top-level rope_theta with rope_scaling."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = found.pop("rope_type", found.pop("type", "default"))
    theta = found.pop("rope_theta", config.get("rope_theta"))
    return RopeConfig(rope_theta=theta, rope_type=kind, **found)


def decoder_config(case: Case) -> DecoderConfig:
    c = case.config
    names = (
        "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "hidden_act", "tie_word_embeddings",
    )  # fmt: skip
    return DecoderConfig(
        **{name: c[name] for name in names} | {"model_type": (case.file_config or c)["model_type"]},
        head_dim=c.get("head_dim", c["hidden_size"] // c["num_attention_heads"]),
        sub_norms=c["model_type"] == "bitnet",
        qk_norms=c["model_type"] == "qwen3",
        linear_norm_eps=case.quantization.get("rms_norm_eps", 1e-6),
        rope=rope(c),
        activation_bits=case.activation_bits,
    )


def stored_scale(case: Case, w: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """int8 t and the float32 factor that a weight of 1 stands for, after the rounding that the file's dtype brings."""
    t, mean = recipe.ternary(w)
    if not case.packed:
        return t, mean
    scale = np.float32(1) / mean if case.inverse else mean
    if case.scale_dtype == "BF16":
        scale = np.float32(recipe.from_bfloat16(recipe.to_bfloat16(np.array([scale])))[0])
    return t, np.float32(1) / scale if case.inverse else scale


def already_ternary(case: Case, name: str, w: np.ndarray, bits: int) -> TernaryTensor:
    """A float weight whose blocks have one magnitude each; scales a row or a group of 128 columns."""
    _, columns = recipe.blocks(case, name, *w.shape)
    if columns == w.shape[1]:
        scale = np.abs(w).max(axis=1)
    else:
        scale = np.abs(w).reshape(len(w), -1, 128).max(axis=2)
    return TernaryTensor(words2.pack(np.sign(w).astype(np.int8)), scale, w.shape, bits)


def table(case: Case, module: str, values: dict[str, np.ndarray]) -> Matrix:
    """The embedding or the head."""
    w = values[f"{module}.weight"]
    if case.ternary == "groups":
        return already_ternary(case, f"{module}.weight", w, 16)
    return DenseRows(w, "float32")


def weights(case: Case) -> DecoderWeights:
    """The case's model."""
    values = recipe.draw(case)
    embed = table(case, "model.embed_tokens", values)
    head = table(case, "lm_head", values) if "lm_head.weight" in values else embed
    out = DecoderWeights(decoder_config(case), embed, head)
    for key, value in values.items():
        name = key.removesuffix(".weight")
        if name.endswith(".rms_norm"):
            continue
        if "norm" in name:
            out.norms[name] = value
        elif name.endswith("_proj"):
            bias = values.get(f"{name}.bias")
            weight: Matrix = DenseRows(value, "float32")
            if case.quantization and case.converted(name):
                t, scale = stored_scale(case, value)
                weight = TernaryTensor(words2.pack(t), np.array(scale, np.float32), value.shape, case.activation_bits)
                if bias is not None and case.packed and not case.inverse:
                    bias = bias * scale  # transformers' offline AutoBitLinear scales the sum, bias included
            if case.ternary:
                weight = already_ternary(case, f"{name}.weight", value, case.activation_bits)
            out.linears[name] = Linear(weight, bias, values.get(f"{name}.rms_norm.weight"))
    return out
