"""What the tensors of a checkpoint add to its config.json: norms, ternary floats, other names. Little of them is read."""

from __future__ import annotations

import re
from dataclasses import replace

from bitnet_mlx.checkpoint.folder import TensorTable
from bitnet_mlx.checkpoint.ternary_floats import looks_ternary, ternary_share
from bitnet_mlx.models import olmo
from bitnet_mlx.models.families import ALIASES
from bitnet_mlx.models.hf_config import ModelConfig

EMBED, HEAD = "model.embed_tokens", "lm_head"
_OLMO = re.compile(r"(?:model\.)?transformer\.(?:blocks\.(\d+)\.)?(\w+)\.weight")
_TERNARY = 0.5  # share of ternary rows below which a float linear was never meant to be; above, some are damaged
_NORM = "norm"  # the last part of the name of bitnet-embedding's norms inside linears


def settle(model: ModelConfig, table: TensorTable) -> ModelConfig:
    """The model as its tensors show it; the table's names become this package's own."""
    _own_names(table)
    if model.decoder.model_type == "olmo":
        _olmo_names(model, table)
    first = "model.layers.0"
    if f"{first}.self_attn.attn_sub_norm.weight" in table and not model.decoder.sub_norms:
        model = replace(model, decoder=replace(model.decoder, sub_norms=True))
    names = model.decoder.linear_shapes()
    if model.linear_norm is None and all(f"{first}.{name}.{_NORM}.weight" in table for name in names):
        model = _normed_linears(model)
    storage = model.quantization.storage
    if storage == "mlx":
        return _mlx(model, table)
    if model.quantization.native and model.quantization.head_bits == 2:
        return replace(model, ternary_tables=(EMBED, HEAD))
    if storage == "dense" and all(looks_ternary(table, f"{first}.{n}.weight") for n in names if _has(table, first, n)):
        return _ternary_floats(model, table)
    return model


def _has(table: TensorTable, layer: str, name: str) -> bool:
    return f"{layer}.{name}.weight" in table


def _own_names(table: TensorTable) -> None:
    """Names of other families, and of models that were saved without their head."""
    if f"{EMBED}.weight" not in table and "embed_tokens.weight" in table:
        table.rename({name: f"model.{name}" for name in list(table) if not name.startswith((HEAD, "model."))})
    found = {}
    for name in table:
        for theirs, ours in ALIASES.items():
            new = name.replace(f".{theirs}.", f".{ours}.")
            if new != name and new not in table:
                found[name] = new
    table.rename(found)


def _olmo_names(model: ModelConfig, table: TensorTable) -> None:
    """OLMo's names, and its fused matrices cut into ours."""
    config = model.decoder
    for name in list(table):
        found = _OLMO.match(name)
        if not found:
            continue
        layer, part = found[1], found[2]
        if layer is None:
            if part in olmo.TABLES:
                table.rename({name: f"{olmo.TABLES[part]}.weight"})
            continue
        prefix = f"model.layers.{layer}"
        if part in olmo.INNER:
            table.rename({name: f"{prefix}.{olmo.INNER[part]}.weight"})
        elif part in olmo.FUSED:
            starts, parts = 0, {}
            for module in olmo.FUSED[part]:
                rows = config.linear_shapes()[module][0]
                parts[f"{prefix}.{module}.weight"] = slice(starts, starts + rows)
                starts += rows
            if table.info(name).shape[:1] == (starts,):
                table.cut(name, parts)


def _normed_linears(model: ModelConfig) -> ModelConfig:
    """bitnet-embedding: a norm before each linear, and master weights, which config.json does not tell."""
    quantization, notices = model.quantization, model.notices
    if quantization.storage == "dense":
        quantization = replace(quantization, storage="online")
        notices = (
            "each linear has a norm of its own and config.json has no quantization_config: the float weights are taken "
            "for BitNet's master weights and ternarised (absmean)",
        )
    decoder = replace(model.decoder, linear_norm_eps=model.decoder.rms_norm_eps)
    return replace(model, decoder=decoder, quantization=quantization, notices=notices, linear_norm=_NORM)


def _mlx(model: ModelConfig, table: TensorTable) -> ModelConfig:
    """MLX's form: what has no scales is float."""
    layers = range(model.decoder.num_hidden_layers)
    modules = [f"model.layers.{layer}.{name}" for layer in layers for name in model.decoder.linear_shapes()]
    kept = tuple(module for module in modules if f"{module}.scales" not in table)
    tables = tuple(module for module in (EMBED, HEAD) if f"{module}.scales" in table)
    if model.quantization.head_bits is not None:
        tables = ()
    quantization = replace(model.quantization, modules_to_not_convert=(HEAD, *kept))
    notices = model.notices
    if len(kept) == len(modules):
        notices += ("config.json promises layers of 2 bits, and no linear here has scales; all of them run as floats",)
    return replace(model, quantization=quantization, ternary_tables=tables, notices=notices)


def _ternary_floats(model: ModelConfig, table: TensorTable) -> ModelConfig:
    """TriLM, Bonsai unpacked: ternary floats, trained without quantised activations.

    A linear that is nothing like ternary, such as one that an adapter was fused into, is read as it is.
    """
    layers = range(model.decoder.num_hidden_layers)
    modules = [f"model.layers.{layer}.{name}" for layer in layers for name in model.decoder.linear_shapes()]
    there = [module for module in modules if f"{module}.weight" in table]
    kept = [module for module in there if ternary_share(table, f"{module}.weight") < _TERNARY]
    tables = tuple(m for m in (EMBED, HEAD) if f"{m}.weight" in table and looks_ternary(table, f"{m}.weight"))
    notice = (
        "the float weights are ternary already and are packed as they are, with 16-bit activations; "
        "--activations 8 quantises them, for a model that was trained so"
    )
    if kept:
        notice += f"; {len(kept)} of {len(modules)} linears are not ternary and stay floats"
    return replace(
        model,
        decoder=replace(model.decoder, activation_bits=16),
        quantization=replace(
            model.quantization, storage="unpacked", activation_bits=16, modules_to_not_convert=(HEAD, *kept)
        ),
        ternary_tables=tables,
        notices=(notice,),
    )
