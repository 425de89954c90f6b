"""OLMo-Bitnet (NousResearch/OLMo-Bitnet-1B): config.json and tensors in OLMo's own names -> Hugging Face's.

Each linear norms its input without a weight (RMS, eps 1e-5) before it quantises it. q, k and v are one matrix, as are
the gate and the input of the feed-forward: silu(second half) * first half. Each fused matrix was ternarised as one.
"""

from __future__ import annotations

from typing import Any

from bitnet_mlx.errors import UnsupportedModelError
from bitnet_mlx.formats.strict_json import shown
from bitnet_mlx.models.config_fields import Fields

MODEL_TYPES = ("olmo", "hf_olmo")
_KEYS = {
    "d_model": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads", "max_sequence_length": "max_position_embeddings",
    "weight_tying": "tie_word_embeddings",
}  # fmt: skip
# What the graph of this package is; other values are other graphs.
_ONLY: dict[str, tuple[Any, ...]] = {
    "layer_norm_type": ("rms",), "activation_type": ("swiglu",), "block_type": ("sequential",), "rope": (True,),
    "alibi": (False, None), "include_bias": (False,), "bias_for_layer_norm": (False, None),
    "attention_layer_norm": (False, None), "multi_query_attention": (False, None), "clip_qkv": (None,),
    "scale_logits": (False, None),
}  # fmt: skip
# Tensors outside the layers, and inside one: theirs -> ours. Fused matrices are cut by `parts`.
TABLES = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}
INNER = {
    "attn_out": "self_attn.o_proj", "ff_out": "mlp.down_proj", "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
}  # fmt: skip
FUSED = {
    "att_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "ff_proj": ("mlp.up_proj", "mlp.gate_proj"),
}


def is_olmo(config: dict[str, Any]) -> bool:
    """Whether a config.json is OLMo's own; transformers' olmo has other keys and another graph."""
    return config.get("model_type") in MODEL_TYPES and "d_model" in config


def translated(config: dict[str, Any], where: str) -> dict[str, Any]:
    """The same config.json in the keys of transformers' Llama. UnsupportedModelError names what is another graph."""
    for key, allowed in _ONLY.items():
        if config.get(key, allowed[0]) not in allowed:
            raise UnsupportedModelError(
                f"[config] {where}: {key} is {shown(config[key])}; for an OLMo model {shown(allowed[0])} is supported"
            )
    fields = Fields(config, where)
    width = fields.size("d_model")
    # mlp_hidden_size counts both halves of the fused matrix.
    double = fields.size("mlp_hidden_size", width * fields.size("mlp_ratio", 4))
    table = {_KEYS.get(key, key): value for key, value in config.items()}
    table |= {
        "model_type": "olmo",
        "intermediate_size": double // 2,
        "vocab_size": fields.size("embedding_size", fields.size("vocab_size")),
        "tie_word_embeddings": fields.flag("weight_tying", True),
        "rms_norm_eps": fields.number("layer_norm_eps", 1e-5),
        "hidden_act": "silu",
    }
    fields.complete()
    return table
