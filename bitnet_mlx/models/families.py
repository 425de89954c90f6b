"""The families of checkpoints, as data: what config.json means where it is silent, and whose tensors have other names.

`FAMILIES` are the architectures that are run, by model_type, with transformers' own defaults. `VARIANTS` are checkpoints
that config.json marks without a quantization_config. `REFUSED` are known ternary models of architectures that are not
run. To add a family of the same graph, add a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Family:
    """What transformers assumes for a model_type.

    qk_norms: q_norm and k_norm on each head. head_dim: where config.json has none; None divides hidden_size by the heads.
    mlp_bias: whether the family knows the key. masters: whether linears are float master weights where there is no
    quantization_config. free_norms: norms without weights inside every linear (their eps is rms_norm_eps).
    """

    hidden_act: str
    rms_norm_eps: float
    rope_theta: float
    sub_norms: bool = False
    qk_norms: bool = False
    mlp_bias: bool = False
    head_dim: int | None = None
    context: int = 2048
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    masters: bool = False
    free_norms: bool = False


FAMILIES: dict[str, Family] = {
    "bitnet": Family("relu2", 1e-5, 500000.0, sub_norms=True, bos_token_id=128000, eos_token_id=128001),
    "llama": Family("silu", 1e-6, 10000.0, mlp_bias=True, bos_token_id=1, eos_token_id=2),
    "qwen3": Family("silu", 1e-6, 10000.0, qk_norms=True, head_dim=128, context=32768),
    # A qwen3 to which `qat --sub-norms` gave norms that transformers' qwen3 does not know.
    "bitnet_qwen3": Family("silu", 1e-6, 10000.0, sub_norms=True, qk_norms=True, head_dim=128, context=32768),
    "olmo": Family("silu", 1e-5, 10000.0, masters=True, free_norms=True),  # OLMo-Bitnet's own keys: models/olmo.py
}


@dataclass(frozen=True)
class Variant:
    """A kind of checkpoint without quantization_config, told by one key of config.json.

    key, value: the mark; for a list, one of its entries. storage: "online" for float master weights. sub_norms: whether
    the layers have them although the family does not. bits: the key that gives the activations' bits. notice: for people.
    """

    name: str
    key: str
    value: Any
    storage: Literal["online", "dense"] = "online"
    sub_norms: bool = False
    notice: str = ""

    def marks(self, config: Mapping[str, Any]) -> bool:
        """Whether config.json bears the mark."""
        found = config.get(self.key)
        return (
            self.value in found if isinstance(found, list) else type(found) is type(self.value) and found == self.value
        )


VARIANTS: tuple[Variant, ...] = (
    Variant("1bitLLM", "architectures", "BitnetForCausalLM", sub_norms=True),
    Variant("1bitLLM", "weight_bits", 1, sub_norms=True),
    Variant(
        "BitNet master weights", "is_bitnet_config", True,
        notice="is_bitnet_config is true and quantization_config is absent: the float weights are taken for master "
        "weights and ternarised (absmean)",
    ),
)  # fmt: skip

# Other names of tensors, by module: theirs -> ours. Used where a checkpoint has the first and not the second.
ALIASES: dict[str, str] = {
    "self_attn.inner_attn_ln": "self_attn.attn_sub_norm",  # 1bitLLM
    "mlp.ffn_layernorm": "mlp.ffn_sub_norm",
}

REFUSED: dict[str, str] = {
    "gemma3_text": "its norms and its scaled embedding are another graph (microsoft/bitnet-embedding-270m)",
    "gemma3": "its norms and its scaled embedding are another graph",
    "qwen3_5": "it is a vision-language model with linear attention (Ternary-Bonsai-27B), and later ones are rotated",
    "qwen3_5_text": "it has linear attention (Ternary-Bonsai-27B)",
    "minicpm": "its scaled embeddings and residuals are another graph (BitCPM)",
    "minicpm4": "its scaled embeddings and residuals are another graph (BitCPM)",
    "hgrn_bit": "it has no attention but a linear recurrence (MMfreeLM)",
    "olmo2": "it norms after its blocks; only OLMo-Bitnet's own names and layout are read (model_type olmo)",
}

# Parts of a tensor's name that say that weights lie in a rotated basis.
ROTATED: tuple[str, ...] = ("signs", "hadamard", "had_k", "rotation")
