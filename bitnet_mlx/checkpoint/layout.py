"""Which tensors a checkpoint must have: what config.json promises, against what the files hold."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bitnet_mlx.checkpoint.folder import TensorTable, name_list
from bitnet_mlx.checkpoint.settle import EMBED, HEAD, settle
from bitnet_mlx.errors import FormatError, UnsupportedModelError
from bitnet_mlx.models.families import ROTATED
from bitnet_mlx.models.hf_config import ModelConfig

# Buffers of old checkpoints, which follow from the config.
_HARMLESS = re.compile(r"rotary_emb\.inv_freq$")
_SCALED = ("weight", "weight_scale")
_PARTS = {"packed": _SCALED, "words2": _SCALED, "trits5": _SCALED, "mlx": ("weight", "scales", "biases")}


@dataclass(frozen=True)
class Layout:
    """Which tensors a checkpoint must have, and where its embedding and head lie. model: as its tensors settle it."""

    model: ModelConfig

    required: dict[str, None]  # in the order of reading
    embed: str
    head: str  # the same module as `embed` where they are tied
    notices: tuple[str, ...]


def plan(model: ModelConfig, table: TensorTable) -> Layout:
    """The tensors that config.json promises. FormatError lists all that are missing or unknown at once.

    UnsupportedModelError where the unknown ones say that the weights lie in a rotated basis.
    """
    model = settle(model, table)
    config, quantization = model.decoder, model.quantization
    embed, head, notices = _tie(model, table)
    required: dict[str, None] = {}

    def matrix(module: str, scaled: bool) -> None:
        required.update({f"{module}.{part}": None for part in parts(quantization.storage, scaled)})

    small_head = quantization.head_bits is not None
    matrix(embed, small_head or embed in model.ternary_tables)
    for layer in range(config.num_hidden_layers):
        for name in config.norm_sizes():
            required.update(dict.fromkeys(_norms(model, table, f"model.layers.{layer}.{name}.weight")))
        for name in config.linear_shapes():
            module = f"model.layers.{layer}.{name}"
            matrix(module, quantization.converts(module))
            if model.linear_norm and quantization.converts(module):
                required[f"{module}.{model.linear_norm}.weight"] = None
            if model.has_bias(name):
                required[f"{module}.bias"] = None
    required.update(dict.fromkeys(_norms(model, table, "model.norm.weight")))
    if head != embed:
        matrix(head, small_head or head in model.ternary_tables)
    # What a tied head's own tensors hold has been compared already.
    spare = {f"{HEAD}.weight", f"{EMBED}.weight"} if head == embed else set()
    unknown = [name for name in table if name not in required and name not in spare and not _HARMLESS.search(name)]
    missing = [name for name in required if name not in table]
    if missing or unknown:
        raise _mismatch(model, table, missing, unknown)
    return Layout(model, required, embed, head, (*model.notices, *notices))


def _norms(model: ModelConfig, table: TensorTable, name: str) -> tuple[str, ...]:
    """A layer's norm, where it must have a weight: OLMo's may have none."""
    return () if model.linear_norm == "" and name not in table else (name,)


def parts(storage: str, ternary: bool) -> tuple[str, ...]:
    """The last parts of the names of a module's tensors, its bias apart."""
    return _PARTS.get(storage, ("weight",)) if ternary else ("weight",)


def _tie(model: ModelConfig, table: TensorTable) -> tuple[str, str, list[str]]:
    """Modules of the embedding and the head, as transformers ties them, and what is odd about it."""
    quantization, notices = model.quantization, []
    if quantization.storage in ("packed", "online") and quantization.converts(HEAD):
        if quantization.storage == "online" or f"{HEAD}.weight_scale" in table:
            raise UnsupportedModelError(
                f"[checkpoint] {table.folder}: modules_to_not_convert leaves out {HEAD}, so the head is ternary; "
                f'only float heads are supported. If the head is float, add "{HEAD}" to the list in config.json'
            )
        notices.append(f"modules_to_not_convert leaves out {HEAD}, but the head has no weight_scale; it runs as floats")
    if not model.decoder.tie_word_embeddings:
        return EMBED, HEAD, notices
    names = (f"{EMBED}.weight", f"{HEAD}.weight")
    if names[0] not in table and names[1] in table:
        return HEAD, HEAD, notices
    if names[1] in table and names[0] in table and not _same(table, *names):
        notices.append(
            f"tie_word_embeddings is true, but {names[1]} differs from {names[0]}; both are used, as transformers does"
        )
        return EMBED, HEAD, notices
    return EMBED, EMBED, notices


def _same(table: TensorTable, a: str, b: str) -> bool:
    """Whether two tensors hold the same bytes, compared in blocks."""
    if (table.info(a).dtype, table.info(a).shape) != (table.info(b).dtype, table.info(b).shape):
        return False
    x, y = table.array(a).reshape(-1).view(np.uint8), table.array(b).reshape(-1).view(np.uint8)
    step = 1 << 20
    return all(np.array_equal(x[at : at + step], y[at : at + step]) for at in range(0, x.size, step))


def _mismatch(model: ModelConfig, table: TensorTable, missing: list[str], unknown: list[str]) -> FormatError:
    unknown = [table.label(name) for name in unknown]
    parts = []
    if missing:
        parts.append(f"lacks {len(missing)} tensors: {name_list(missing)}")
    if unknown:
        parts.append(
            f"has {len(unknown)} tensors that a {model.decoder.model_type} model does not know: {name_list(unknown)}"
        )
    refuse_rotated(table.folder, unknown)
    examples = ", ".join(f"{name} {table.info(name)}" for name in sorted(table)[:3])
    hint = ""
    if missing and all(name.endswith("weight_scale") for name in missing) and model.quantization.storage == "packed":
        hint = '; for master weights config.json says "linear_class": "autobitlinear", "quantization_mode": "online"'
    if unknown and all(name.endswith(".weight_scale") for name in unknown):
        hint = "; modules_to_not_convert in config.json says that the layers of these scales are floats"
    if f"{HEAD}.weight" in missing:
        hint = '; an output head that is the embedding needs "tie_word_embeddings": true in config.json'
    return FormatError(
        f"[checkpoint] {table.folder} {'; it '.join(parts)}; it has {len(table)}, such as {examples}{hint}"
    )


def refuse_rotated(where: Path, unknown: list[str]) -> None:
    """Raise UnsupportedModelError where names of tensors that no model has say that the weights are rotated."""
    rotated = [name for name in unknown if any(part in name.lower() for part in ROTATED)]
    if rotated:
        raise UnsupportedModelError(
            f"[checkpoint] {where} holds {name_list(rotated)}: its weights lie in a rotated (Hadamard) basis, and "
            "the rotation of activations that undoes it is not applied here; give a checkpoint that was not rotated"
        )
