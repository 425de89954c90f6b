"""The golden cases: each a config.json as published models have it, a seed, and the tokens that were fed."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

SHORT = (1, 5, 9, 17, 33, 2, 60, 7)
SEED = 20260101
# Different for each projection, so that a swapped or an inverted scale moves the logits.
GAINS = dict(q_proj=0.5, k_proj=0.35, v_proj=0.2, o_proj=0.15, gate_proj=0.25, up_proj=0.4, down_proj=0.1)


@dataclass(frozen=True)
class Case:
    """One checkpoint and one input.

    scale_dtype: of weight_scale in the file, BF16 or F32. gains: factor on a weight by the name it ends in.
    kept: the positions whose logits are stored; None for all. greedy: tokens generated after the input.
    ties: embedding rows and a first norm such that layer 0's codes fall exactly half way between two integers.
    activation_bits: 16 runs transformers with its activation quantiser replaced by the identity.
    ternary: the float weights are ternary already: "groups" of 128 columns (embedding and head too), or "shards" of rows
    or of columns, as the linear's kind was split in training.
    file_config, file_names: where the published file differs from the one that transformers can run: config.json, and
    other names of modules (ours -> theirs).
    """

    name: str
    config: dict[str, Any]
    seed: int = SEED
    tokens: tuple[int, ...] = SHORT
    scale_dtype: str = "BF16"
    gains: dict[str, float] = field(default_factory=dict)
    kept: tuple[int, ...] | None = None
    greedy: int = 0
    activation_bits: int = 8
    ties: bool = False
    ternary: str = ""
    file_config: dict[str, Any] | None = None
    file_names: dict[str, str] = field(default_factory=dict)

    @property
    def quantization(self) -> dict[str, Any]:
        """config.json's quantization_config, empty where there is none."""
        return self.config.get("quantization_config", {})

    @property
    def packed(self) -> bool:
        """Whether the file holds uint8 weights with scales."""
        return bool(self.quantization) and self.quantization.get("quantization_mode", "offline") == "offline"

    def published_name(self, name: str) -> str:
        """A tensor's name in the published file."""
        for ours, theirs in self.file_names.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
        return name

    @property
    def inverse(self) -> bool:
        """Whether w = t / weight_scale, the rule of transformers' default linear_class."""
        return self.quantization.get("linear_class", "bitlinear") == "bitlinear"

    def converted(self, module: str) -> bool:
        """Whether transformers turns this linear of a layer into a BitNet linear."""
        keys = self.quantization.get("modules_to_not_convert") or []
        return not any(re.match(rf"(?:{k})(?:(?<=\.)|(?=\.|$))", module) or module.endswith(k) for k in keys)

    def gain(self, name: str) -> float:
        """The factor on a drawn weight or bias."""
        if name.endswith(".bias"):
            return 0.1
        module = name.removesuffix(".weight").rsplit(".", 1)[-1]
        return self.gains.get(module, 0.5 if module.endswith("_proj") else 1.0)


def _auto(mode: str = "offline", **more: Any) -> dict[str, Any]:
    return {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": mode, **more}


INVERSE: dict[str, Any] = {"quant_method": "bitnet", "modules_to_not_convert": None}


def _bitnet(quantization: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """config.json in the manner of microsoft/bitnet-b1.58-2B-4T: top-level rope_theta, tied head."""
    config: dict[str, Any] = dict(
        architectures=["BitNetForCausalLM"], model_type="bitnet", vocab_size=64, hidden_size=64, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_act="relu2", rms_norm_eps=1e-5,
        rope_theta=500000.0, max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        torch_dtype="bfloat16", use_cache=True, initializer_range=0.02,
    )  # fmt: skip
    config.update(changes)
    config = {key: value for key, value in config.items() if value is not None}
    if quantization:
        config["quantization_config"] = quantization
    return config


def _llama(quantization: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """config.json in the manner of HF1BitLLM/Llama3-8B-1.58: no sub-norms, silu, scales that divide."""
    changes = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", **changes}
    return _bitnet(INVERSE if quantization is None else quantization, **changes)


def _tokens(length: int, vocab: int, seed: int = 5) -> tuple[int, ...]:
    return tuple(int(t) for t in np.random.default_rng(seed).integers(0, vocab, length))


def _first() -> list[Case]:
    """The configuration that most checks of published formats used: every storage of the same weights."""
    return [
        Case("bitnet-float", _bitnet()),
        Case("bitnet-online", _bitnet(_auto("online")), greedy=24),
        Case("bitnet-online-a16", _bitnet(_auto("online")), activation_bits=16),
        Case("bitnet-packed", _bitnet(_auto())),
        Case("bitnet-packed-f32", _bitnet(_auto()), scale_dtype="F32"),
        Case("bitnet-inverse", _bitnet(INVERSE)),
        Case("bitnet-inverse-f32", _bitnet(INVERSE), scale_dtype="F32"),
        Case("llama-inverse", _llama()),
    ]


def _odd() -> list[Case]:
    """Sizes on no boundary, biases, untied heads, every rope spelling and kind, linears left dense."""
    small = dict(hidden_size=72, intermediate_size=100, num_attention_heads=4, vocab_size=67, tie_word_embeddings=False)
    llama3 = dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
    )
    yarn = dict(rope_type="yarn", rope_theta=500000.0, factor=4.0, original_max_position_embeddings=32)
    dense = ["lm_head", "model.layers.0.self_attn.v_proj", "down_proj", r"model\.layers\.1\.self_attn\.[qk]_proj"]
    return [
        Case(
            "llama-odd-llama3",
            _llama(
                None, **{**small, "hidden_size": 108, "intermediate_size": 148, "num_attention_heads": 6}, head_dim=28,
                attention_bias=True, mlp_bias=True, rope_scaling=llama3, max_position_embeddings=512,
            ),
            seed=3, tokens=_tokens(48, 67), gains=GAINS, greedy=24,
        ),
        Case(
            "llama-auto-yarn",
            _llama(
                _auto(), **small, head_dim=22, attention_bias=True, rope_theta=None, rope_parameters=yarn,
                max_position_embeddings=128,
            ),
            seed=4, tokens=_tokens(48, 67), scale_dtype="F32", gains=GAINS,
        ),
        Case(
            "llama-online-linear",
            _llama(
                _auto("online"), **small, head_dim=18, mlp_bias=True, rope_scaling={"type": "linear", "factor": 2.0},
                rope_theta=10000.0,
            ),
            seed=5, tokens=_tokens(24, 67), gains=GAINS,
        ),
        Case(
            "bitnet-odd",
            _bitnet(
                _auto("online"), **small, head_dim=18, attention_bias=True, rope_theta=None,
                rope_parameters={"rope_type": "default", "rope_theta": 1000042.0},
            ),
            seed=6, tokens=_tokens(24, 67), gains=GAINS,
        ),
        Case(
            "llama-some-dense",
            _llama({"quant_method": "bitnet", "modules_to_not_convert": dense}, **small, head_dim=20),
            seed=7, tokens=_tokens(24, 67), gains=GAINS,
        ),
        Case(
            "bitnet-ties", _bitnet(_auto("online"), tie_word_embeddings=False),
            seed=9, tokens=_tokens(16, 64), ties=True,
        ),
    ]  # fmt: skip


def _long() -> list[Case]:
    """Past position 2000. One layer: then a flipped code far back cannot reach a later position through the cache."""
    kept = (0, 1, 63, 64, 511, 1023, 1024, 1999, *range(2084, 2100))
    sizes = dict(
        hidden_size=128,
        intermediate_size=192,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        num_hidden_layers=1,
    )
    return [
        Case(
            "bitnet-long", _bitnet(_auto("online"), **sizes), seed=8, tokens=_tokens(2100, 64), gains=GAINS, kept=kept
        ),
    ]


def _qwen3(quantization: dict[str, Any] | None, **changes: Any) -> dict[str, Any]:
    """config.json in the manner of Qwen3: norms of heads, an explicit head_dim, no sub-norms."""
    fixed = dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3", hidden_act="silu", rms_norm_eps=1e-6,
                 head_dim=24, attention_bias=False, use_sliding_window=False)  # fmt: skip
    return _bitnet(quantization, **{**fixed, **changes})


def _families() -> list[Case]:
    """What other families add: norms of heads, norms inside linears, floats that are ternary, other names."""
    wide = dict(hidden_size=256, intermediate_size=384, tie_word_embeddings=False)
    inside = dict(INVERSE, use_rms_norm=True, rms_norm_eps=1e-5)
    odd = dict(hidden_size=72, intermediate_size=148, num_attention_heads=4, tie_word_embeddings=False)
    one_bit = _bitnet(_auto("online"), **odd, hidden_act="silu", rope_theta=10000.0)
    published = {key: value for key, value in one_bit.items() if key != "quantization_config"}
    published |= dict(architectures=["BitnetForCausalLM"], model_type="llama", weight_bits=1, input_bits=8)
    names = {"self_attn.attn_sub_norm": "self_attn.inner_attn_ln", "mlp.ffn_sub_norm": "mlp.ffn_layernorm"}
    return [
        Case("qwen3-online", _qwen3(_auto("online")), seed=21, tokens=_tokens(24, 64), gains=GAINS, greedy=16),
        Case(
            "qwen3-groups", _qwen3(None, **wide, head_dim=128),
            seed=22, tokens=_tokens(24, 64), gains=GAINS, ternary="groups", activation_bits=16,
        ),
        Case(
            "llama-shards",
            _llama({}, **{**wide, "intermediate_size": 512}),
            seed=23, tokens=_tokens(24, 64), gains={**GAINS, "q_proj": 0.12, "k_proj": 0.1}, ternary="shards", activation_bits=16,
        ),
        Case("llama-rms-norm", _llama(inside), seed=24, tokens=_tokens(24, 64), gains=GAINS),
        Case(
            "bitnet-rms-norm-online", _bitnet(_auto("online", use_rms_norm=True, modules_to_not_convert=["up_proj", "lm_head"])),
            seed=25, tokens=_tokens(24, 64), gains=GAINS,
        ),
        Case(
            "1bitllm", one_bit,
            seed=26, tokens=_tokens(24, 64), gains=GAINS, file_config=published, file_names=names,
        ),
    ]  # fmt: skip


CASES: dict[str, Case] = {case.name: case for case in (*_first(), *_odd(), *_long(), *_families())}
