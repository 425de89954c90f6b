"""config.json -> DecoderConfig: the families of models/families.py, with transformers' names and defaults, strictly."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from bitnet_mlx.errors import FormatError, UnsupportedModelError
from bitnet_mlx.formats.strict_json import shown
from bitnet_mlx.models.config import DecoderConfig, RopeConfig
from bitnet_mlx.models.config_fields import Fields
from bitnet_mlx.models.families import FAMILIES, REFUSED, VARIANTS, Family, Variant
from bitnet_mlx.models.olmo import MODEL_TYPES, is_olmo, translated
from bitnet_mlx.models.quantization import Quantization, parse_quantization

# 128 * K must stay below 2^24 for the integer sums to be exact in float32.
MAX_WIDTH = 1 << 17
MAX_LAYERS = 10_000
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_ACTIVATIONS = {"relu2": "relu2", "silu": "silu", "swish": "silu"}
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelConfig:
    """All that config.json says: the decoder, the storage, which linears have biases, and what is odd about it.

    linear_norm: the last part of the name of a norm inside each ternary linear ("rms_norm"), "" for norms without
    weights, None for no such norms. ternary_tables: those of the embedding and the head that are ternary. variant: the
    name of the variant, if one is marked. What the tensors add is settled by checkpoint/settle.py.
    """

    decoder: DecoderConfig
    quantization: Quantization
    attention_bias: bool = False
    mlp_bias: bool = False
    notices: tuple[str, ...] = ()
    linear_norm: str | None = None
    ternary_tables: tuple[str, ...] = ()
    variant: str | None = None

    def has_bias(self, name: str) -> bool:
        """Whether the linear of this name inside a layer ("self_attn.q_proj") has a bias."""
        return self.attention_bias if name.startswith("self_attn.") else self.mlp_bias


def parse_config(config: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """Read a config.json.

    where: the file, for messages. Raises UnsupportedModelError for a family, storage or rope kind that is not run,
    FormatError for missing keys (all at once), wrong types and impossible sizes (by the key's name).
    """
    if is_olmo(config):
        config = translated(config, where)
    elif config.get("model_type") in MODEL_TYPES:
        raise UnsupportedModelError(
            f"[config] {where}: model_type is {shown(config['model_type'])} without OLMo's own keys (d_model); of OLMo "
            "models only OLMo-Bitnet in its own layout is supported"
        )
    fields = Fields(config, where)
    if config.get("model_file") is not None:
        raise UnsupportedModelError(
            f"[config] {where}: model_file is {shown(config['model_file'])}; code from a checkpoint is never run"
        )
    model_type = config.get("model_type")
    family = _family(model_type, where)
    quantization = parse_quantization(config, where)
    notices: list[str] = []
    variant = None if quantization.storage != "dense" else next((v for v in VARIANTS if v.marks(config)), None)
    if variant is not None:
        quantization = _variant_storage(fields, variant, quantization, notices)
    if family.masters and quantization.storage == "dense":
        quantization = replace(quantization, storage="online")
    free = family.free_norms and not quantization.native
    if free:
        eps = fields.number("rms_norm_eps", family.rms_norm_eps)
        quantization = replace(quantization, linear_norm="", linear_norm_eps=eps)
    decoder = _decoder(fields, cast(str, model_type), family, quantization, notices)
    if variant is not None and variant.sub_norms:
        decoder = replace(decoder, sub_norms=True)
    if quantization.storage == "dense":
        notices.append("config.json has no quantization_config; the layers run as floats, as transformers runs them")
    return ModelConfig(
        decoder,
        quantization,
        fields.flag("attention_bias", False),
        family.mlp_bias and fields.flag("mlp_bias", False),
        tuple(notices),
        quantization.linear_norm,
        variant=None if variant is None else variant.name,
    )


def _family(model_type: Any, where: str) -> Family:
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is not None:
        return family
    reason = REFUSED.get(model_type, "") if isinstance(model_type, str) else ""
    raise UnsupportedModelError(
        f"[config] {where}: model_type is {shown(model_type)}; {', '.join(FAMILIES)} are supported"
        + (f"; {reason}" if reason else "")
    )


def _variant_storage(fields: Fields, variant: Variant, found: Quantization, notices: list[str]) -> Quantization:
    """The storage of a checkpoint that a variant marks."""
    bits = fields.get("input_bits")
    if bits not in (None, 8, 16) or isinstance(bits, bool):
        raise UnsupportedModelError(f"[config] {fields.where}: input_bits is {shown(bits)}; 8 and 16 are supported")
    if fields.get("weight_bits") not in (None, 1):
        raise UnsupportedModelError(
            f"[config] {fields.where}: weight_bits is {shown(fields.get('weight_bits'))}; 1, which stands for ternary "
            "weights, is supported"
        )
    if variant.notice:
        notices.append(variant.notice)
    return replace(found, storage=variant.storage, activation_bits=bits or 8)


def _decoder(
    fields: Fields, model_type: str, family: Family, quantization: Quantization, notices: list[str]
) -> DecoderConfig:
    vocab = fields.size("vocab_size")
    hidden = fields.size("hidden_size", limit=MAX_WIDTH)
    intermediate = fields.size("intermediate_size", limit=MAX_WIDTH)
    layers = fields.size("num_hidden_layers", limit=MAX_LAYERS)
    heads = fields.size("num_attention_heads", limit=MAX_WIDTH)
    fields.complete()
    kv_heads = fields.size("num_key_value_heads", heads, MAX_WIDTH)
    head_dim = fields.size("head_dim", 0, MAX_WIDTH)
    if not head_dim:
        if family.head_dim is None and hidden % heads:
            raise fields.wrong("num_attention_heads", f"without head_dim it must divide hidden_size ({hidden})")
        head_dim = family.head_dim or hidden // heads
    if heads % kv_heads:
        raise fields.wrong("num_key_value_heads", f"it must divide num_attention_heads ({heads})")
    if head_dim % 2 or heads * head_dim > MAX_WIDTH:
        raise FormatError(
            f"[config] {fields.where}: head_dim is {head_dim} with {heads} heads; "
            f"an even head_dim and at most {MAX_WIDTH} columns are allowed"
        )
    act = fields.text("hidden_act", family.hidden_act)
    if act not in _ACTIVATIONS:
        raise UnsupportedModelError(
            f"[config] {fields.where}: hidden_act is {shown(act)}; relu2 and silu are supported"
        )
    _full_attention(fields)
    context = fields.size("max_position_embeddings", family.context)
    return DecoderConfig(
        model_type=model_type,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps", family.rms_norm_eps),
        max_position_embeddings=context,
        hidden_act=cast(Literal["relu2", "silu"], _ACTIVATIONS[act]),
        sub_norms=family.sub_norms,
        qk_norms=family.qk_norms,
        linear_norm_eps=quantization.linear_norm_eps,
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        rope=_rope(fields, family, context, notices),
        activation_bits=quantization.activation_bits,
        dtype=_dtype(fields),
        bos_token_id=_default_token(fields, "bos_token_id", family.bos_token_id, vocab),
        eos_token_ids=_eos(fields, family, vocab),
        pad_token_id=fields.token("pad_token_id"),
    )


def _dtype(fields: Fields) -> str:
    """dtype, or torch_dtype as older files spell it; bfloat16 where neither is there."""
    key = "dtype" if fields.get("dtype") is not None else "torch_dtype"
    name = fields.text(key, "bfloat16").removeprefix("torch.")
    if name not in _DTYPES:
        raise UnsupportedModelError(
            f"[config] {fields.where}: {key} is {shown(name)}; {', '.join(_DTYPES)} are supported"
        )
    return name


def _full_attention(fields: Fields) -> None:
    """Raise UnsupportedModelError where some layers see a window only."""
    layers = fields.get("layer_types")
    sliding = isinstance(layers, list) and any(kind != "full_attention" for kind in layers)
    if sliding or fields.flag("use_sliding_window", False):
        raise UnsupportedModelError(
            f"[config] {fields.where}: use_sliding_window is {shown(fields.get('use_sliding_window'))} and layer_types "
            "names layers of other kinds than full_attention; every layer sees all positions here"
        )


def _default_token(fields: Fields, key: str, default: int | None, vocab: int) -> int | None:
    """A token id; where the key is absent the family's own, unless the vocabulary has no such token."""
    if key in fields.table:
        return fields.token(key)
    return default if default is not None and default < vocab else None


def _eos(fields: Fields, family: Family, vocab: int) -> tuple[int, ...]:
    if "eos_token_id" in fields.table:
        return fields.tokens("eos_token_id")
    default = family.eos_token_id
    return (default,) if default is not None and default < vocab else ()


def _rope(fields: Fields, family: Family, context: int, notices: list[str]) -> RopeConfig:
    """Both spellings: rope_theta with rope_scaling, and rope_parameters. Precedence as in transformers."""
    old, new = fields.nested("rope_scaling"), fields.nested("rope_parameters")
    key = "rope_scaling" if old else "rope_parameters"
    rope = Fields(old or new or {}, f"{fields.where}: {key}")
    nested = [name for name, value in rope.table.items() if isinstance(value, dict)]
    if nested:
        raise UnsupportedModelError(
            f"[config] {rope.where} differs by layer type ({', '.join(map(shown, nested))}); one rotary embedding for "
            "all layers is supported"
        )
    theta = rope.number("rope_theta", fields.number("rope_theta", family.rope_theta))
    if rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0)) != 1.0:
        raise UnsupportedModelError(
            f"[config] {fields.where}: partial_rotary_factor is not 1; whole heads are rotated here"
        )
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind not in _ROPE_TYPES:
        raise UnsupportedModelError(
            f"[config] {rope.where}: rope_type is {shown(kind)}; {', '.join(_ROPE_TYPES)} are supported"
        )
    if old and new and _plain(old) != _plain(new):
        notices.append("rope_scaling and rope_parameters differ; rope_scaling is used, as transformers does")
    if kind == "default":
        return RopeConfig(rope_theta=theta)
    if kind == "linear":
        factor = rope.number("factor")
        rope.complete()
        return RopeConfig(rope_theta=theta, rope_type="linear", factor=factor)
    # A value at the top level wins, as in transformers.
    original = fields.size("original_max_position_embeddings", rope.size("original_max_position_embeddings", context))
    return _llama3(rope, theta, original) if kind == "llama3" else _yarn(rope, theta, original, context)


def _plain(table: dict[str, Any]) -> dict[str, Any]:
    """A rope table with one spelling of its kind and without the base, which has places of its own."""
    kind = table.get("rope_type", table.get("type", "default"))
    return {**{k: v for k, v in table.items() if k not in ("type", "rope_type", "rope_theta")}, "rope_type": kind}


def _llama3(rope: Fields, theta: float, original: int) -> RopeConfig:
    factor, low, high = rope.number("factor"), rope.number("low_freq_factor"), rope.number("high_freq_factor")
    rope.complete()
    if high <= low:
        raise rope.wrong("high_freq_factor", f"it must be above low_freq_factor ({low})")
    return RopeConfig(
        rope_theta=theta,
        rope_type="llama3",
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=original,
    )


def _yarn(rope: Fields, theta: float, original: int, context: int) -> RopeConfig:
    if theta <= 1:
        raise FormatError(f"[config] {rope.where}: rope_theta is {theta}; yarn needs a base above 1")
    factor = rope.number("factor", context / original if "factor" in rope.table else 0.0)
    if not factor:
        rope.missing.append("factor")
    rope.complete()

    def optional(key: str) -> float | None:
        return rope.number(key, positive=False) if rope.get(key) is not None else None

    return RopeConfig(
        rope_theta=theta,
        rope_type="yarn",
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=optional("attention_factor"),
        # 0 counts as absent, as in transformers.
        beta_fast=rope.number("beta_fast", 32.0, positive=False) or 32.0,
        beta_slow=rope.number("beta_slow", 1.0, positive=False) or 1.0,
        mscale=optional("mscale"),
        mscale_all_dim=optional("mscale_all_dim"),
        truncate=rope.flag("truncate", True),
    )
