"""A GGUF file's metadata as the config.json that its model would have, with Hugging Face's keys."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitnet_mlx.checkpoint.gguf_file import GgufFile
from bitnet_mlx.errors import UnsupportedModelError
from bitnet_mlx.formats.strict_json import shown
from bitnet_mlx.models.config import RopeConfig
from bitnet_mlx.models.config_fields import Fields
from bitnet_mlx.models.rope import scaled_frequencies


@dataclass(frozen=True)
class Architecture:
    """permuted: whether rows of q and k lie in llama.cpp's order, pairs side by side, instead of Hugging Face's."""

    model_type: str
    hidden_act: str
    permuted: bool = False


# bitnet-25 and bitnet-b1.58 are two names of microsoft's 2B model; bitnet is 1bitLLM's, which has another activation.
ARCHITECTURES = {
    "bitnet": Architecture("bitnet", "silu"),
    "bitnet-25": Architecture("bitnet", "relu2"),
    "bitnet-b1.58": Architecture("bitnet", "relu2"),
    "llama": Architecture("llama", "silu", permuted=True),
    "qwen3": Architecture("qwen3", "silu"),
}
# Keys behind the architecture's name. What changes a model's arithmetic and is not read here is refused, unless it is 0.
_READ = frozenset(
    """
    block_count context_length embedding_length feed_forward_length vocab_size attention.head_count
    attention.head_count_kv attention.key_length attention.value_length attention.layer_norm_rms_epsilon
    rope.dimension_count rope.freq_base rope.scaling.type rope.scaling.factor rope.scaling.original_context_length
    rope.scaling.finetuned rope.scaling.attn_factor rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow
    rope.scaling.yarn_log_multiplier tensor_data_layout pooling_type
    """.split()
)
_REFUSED = (
    "expert_", "attention.sliding_window", "attention.scale", "attention.clamp", "attention.max_alibi_bias",
    "attention.layer_norm_epsilon", "logit_scale", "residual_scale", "embedding_scale", "attn_logit_softcapping",
    "final_logit_softcapping", "rope.scale_linear", "rope.dimension_sections", "use_parallel_residual",
)  # fmt: skip
# Llama 3.1's and 3.2's, which the file's rope_freqs tensor is checked against.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def architecture(file: GgufFile) -> Architecture:
    """What general.architecture names. Raises UnsupportedModelError for what is not run, which lists what is."""
    name = Fields(file.metadata, str(file.path)).text("general.architecture", "")
    if name not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"[gguf] {file.path}: general.architecture is {shown(name) if name else 'missing'}; "
            f"{', '.join(ARCHITECTURES)} are supported"
        )
    return ARCHITECTURES[name]


def hf_config(file: GgufFile, notices: list[str]) -> dict[str, Any]:
    """The model's config.json, without quantization_config. notices: gets what is odd.

    Raises UnsupportedModelError and FormatError in the names of the file's own keys and tensors.
    """
    kind = architecture(file)
    parts = file.metadata.get("split.count", 0)
    if parts not in (0, 1):
        raise UnsupportedModelError(
            f"[gguf] {file.path} is one of {shown(parts)} parts of a model; whole files are read. Join them with "
            "llama.cpp's llama-gguf-split --merge"
        )
    prefix = file.metadata["general.architecture"]
    _check_keys(file, prefix, notices)
    f = Fields(file.metadata, str(file.path))
    hidden, heads = f.size(f"{prefix}.embedding_length"), f.size(f"{prefix}.attention.head_count")
    config: dict[str, Any] = {
        "model_type": kind.model_type,
        "hidden_act": kind.hidden_act,
        "hidden_size": hidden,
        "intermediate_size": f.size(f"{prefix}.feed_forward_length"),
        "num_hidden_layers": f.size(f"{prefix}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": f.size(f"{prefix}.attention.head_count_kv", heads),
        "max_position_embeddings": f.size(f"{prefix}.context_length"),
        "rms_norm_eps": _decimal(f.number(f"{prefix}.attention.layer_norm_rms_epsilon")),
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": f.token("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _ends(f),
    }
    f.complete()
    dim = f.size(f"{prefix}.attention.key_length", max(hidden // heads, 1))
    config["head_dim"] = dim
    for name, text in (
        ("rope.dimension_count", "whole heads are rotated"),
        ("attention.value_length", "one size is used"),
    ):
        if f.size(f"{prefix}.{name}", dim) != dim:
            raise f.wrong(f"{prefix}.{name}", f"it must be the head's size, {dim}: {text} here")
    config["vocab_size"] = _vocabulary(file, f, prefix)
    if "blk.0.attn_q.bias" in file.tensors:
        config["attention_bias"] = True
    config.update(_rope(file, f, prefix, config["max_position_embeddings"], dim))
    return config


def _decimal(value: float) -> float:
    """The shortest decimal that rounds to this float32: 1e-05 again, which the file holds as 9.99999975e-06."""
    return float(str(np.float32(value)))


def _check_keys(file: GgufFile, prefix: str, notices: list[str]) -> None:
    """Refuse keys that change the arithmetic, and tell of those that nobody here knows."""
    keys = {
        key.removeprefix(f"{prefix}."): value for key, value in file.metadata.items() if key.startswith(f"{prefix}.")
    }
    unknown = {key: value for key, value in keys.items() if key not in _READ}
    refused = [key for key, value in unknown.items() if key.startswith(_REFUSED) and value]
    if refused or keys.get("attention.causal") is False:
        names = ", ".join(f"{prefix}.{key}" for key in refused) or f"{prefix}.attention.causal = false"
        raise UnsupportedModelError(f"[gguf] {file.path}: the metadata has {names}, which is not applied here")
    ignored = [f"{prefix}.{key}" for key in unknown if key != "attention.causal" and not key.startswith(_REFUSED)]
    if ignored:
        notices.append(f"metadata that is not known here and not used: {', '.join(shown(key) for key in ignored)}")


def _ends(f: Fields) -> list[int]:
    """Ids that end a text or a turn."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = [f.token(f"tokenizer.ggml.{key}") for key in keys]
    return list(dict.fromkeys(i for i in ids if i is not None))


def _vocabulary(file: GgufFile, f: Fields, prefix: str) -> int:
    """Rows of the embedding; what the metadata says of them must agree."""
    info = file.tensors.get("token_embd.weight")
    stated = f"{prefix}.vocab_size"
    if info is None:  # the reader tells of all missing tensors at once
        return f.size(stated, 1)
    rows = info.shape[0]
    if f.size(stated, rows) != rows:
        raise f.wrong(stated, f"tensor token_embd.weight is {info}, outermost first")
    return rows


def _rope(file: GgufFile, f: Fields, prefix: str, context: int, dim: int) -> dict[str, Any]:
    theta = _decimal(f.number(f"{prefix}.rope.freq_base", 10000.0))
    kind = f.text(f"{prefix}.rope.scaling.type", "none")
    factor = _decimal(f.number(f"{prefix}.rope.scaling.factor", 1.0))
    found: dict[str, Any] = {"rope_theta": theta}
    if "rope_freqs.weight" in file.tensors:
        if kind not in ("none", "linear") or factor != 1.0:
            raise f.wrong(f"{prefix}.rope.scaling.type", "with a tensor rope_freqs.weight it must be none")
        return {**found, **_from_factors(file, theta, dim)}
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return found
    if kind == "linear":
        return {**found, "rope_scaling": {"rope_type": "linear", "factor": factor}}
    if kind != "yarn":
        raise UnsupportedModelError(
            f"[gguf] {file.path}: {prefix}.rope.scaling.type is {shown(kind)}; none, linear and yarn are supported"
        )
    table: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": f.size(f"{prefix}.rope.scaling.original_context_length", context),
        "beta_fast": f.number(f"{prefix}.rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": f.number(f"{prefix}.rope.scaling.yarn_beta_slow", 1.0),
    }
    if f.number(f"{prefix}.rope.scaling.yarn_log_multiplier", 0.0, positive=False):
        raise f.wrong(f"{prefix}.rope.scaling.yarn_log_multiplier", "only 0 is supported")
    attention = f.number(f"{prefix}.rope.scaling.attn_factor", 1.0)
    if attention != 1.0:
        table["attention_factor"] = attention * (1 + 0.1 * math.log(factor))
    return {**found, "rope_scaling": table}


def _from_factors(file: GgufFile, theta: float, dim: int) -> dict[str, Any]:
    """rope_freqs.weight [dim / 2] divides the frequencies: Llama 3's scaling, whose factor is its largest value."""
    info = file.tensors["rope_freqs.weight"]
    if info.kind != "F32" or info.shape != (dim // 2,):
        raise UnsupportedModelError(
            f"[gguf] {file.path}: tensor rope_freqs.weight is {info}; F32 [{dim // 2}] is needed"
        )
    factors = file.array("rope_freqs.weight").view("<f4").astype(np.float32)
    if (factors == 1).all():
        return {}
    factor = float(factors.max())
    if factor > 1:
        rope = RopeConfig(rope_theta=theta, rope_type="llama3", factor=factor, **_LLAMA3)
        wanted, _ = scaled_frequencies(rope, dim, 0)
        plain, _ = scaled_frequencies(RopeConfig(rope_theta=theta), dim, 0)
        if np.allclose(plain / factors, wanted, rtol=1e-5, atol=0):
            return {"rope_scaling": {"rope_type": "llama3", "factor": factor, **_LLAMA3}}
    raise UnsupportedModelError(
        f"[gguf] {file.path}: tensor rope_freqs.weight is not Llama 3's scaling (factors from {factors.min():g} to "
        f"{factors.max():g}, low 1, high 4, original context 8192), the only one that is supported"
    )
