"""quantization_config: how a checkpoint stores its linear layers, and which of them are ternary."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from bitnet_mlx.errors import FormatError, UnsupportedModelError
from bitnet_mlx.formats.strict_json import shown
from bitnet_mlx.models.config_fields import Fields

NATIVE_METHOD, NATIVE_FORMATS, NATIVE_VERSION = "bitnet-mlx", ("words2", "trits5"), 1
_SUPPORTED = (
    "supported are quant_method bitnet (Hugging Face), bitnet-mlx (this package), MLX's 2 bits in groups of 64 or 128, "
    "and no quantisation at all"
)

_TABLES = ("model.embed_tokens", "lm_head")


@dataclass(frozen=True)
class Quantization:
    """storage: packed (uint8, four rows a byte, and weight_scale), online (float master weights, ternarised when read),
    words2 and trits5 (this package's own), mlx (MLX's 2-bit form: words, scales and biases), unpacked (floats that are ternary
    already), dense (float layers run as floats) or gguf (each tensor tells its own type).

    divide: whether w = t / weight_scale; otherwise w = t * weight_scale.
    modules_to_not_convert: as in config.json; None stands for "the output head".
    head_bits: bits of the head's codes in this package's own format; None where the file's dtype says all.
    linear_norm: the last part of the name of a norm inside each ternary linear, or None; linear_norm_eps: its eps.
    group: columns that share a scale in MLX's form.
    """

    storage: Literal["packed", "online", "words2", "trits5", "mlx", "unpacked", "dense", "gguf"] = "dense"
    divide: bool = False
    modules_to_not_convert: tuple[str, ...] | None = None
    activation_bits: int = 8
    head_bits: int | None = None
    linear_norm: str | None = None
    linear_norm_eps: float = 1e-6
    group: int = 128

    @property
    def native(self) -> bool:
        """Whether this package wrote it."""
        return self.storage in NATIVE_FORMATS

    @property
    def scales_bias(self) -> bool:
        """Whether the bias is multiplied by the scale too: transformers' packed AutoBitLinear scales the whole sum."""
        return self.storage == "packed" and not self.divide

    def converts(self, name: str) -> bool:
        """Whether the linear layer of this full name ("model.layers.0.mlp.up_proj", "lm_head") is ternary.

        As transformers' should_convert_module: an entry keeps a layer dense where it matches the name's beginning up to
        a module boundary, as text or as a regular expression, or where the name ends with it. null keeps the head.
        """
        if self.storage == "dense":
            return False
        entries = ("lm_head",) if self.modules_to_not_convert is None else self.modules_to_not_convert
        return not any(re.match(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))", name) or name.endswith(entry) for entry in entries)


def parse_quantization(config: dict[str, Any], where: str) -> Quantization:
    """The storage that config.json declares.

    Raises UnsupportedModelError for methods, formats and options that are not read, FormatError for malformed values.
    """
    fields = Fields(config, where)
    if config.get("compression_config"):
        raise UnsupportedModelError(
            f"[config] {where}: compression_config is {shown(config['compression_config'])}; {_SUPPORTED}. "
            "Give the model's original checkpoint"
        )
    if (rotated := _rotation(config)) is not None:
        raise UnsupportedModelError(
            f"[config] {where}: {rotated} speaks of a Hadamard rotation of weights or activations, which is not applied here; "
            "give a checkpoint that was not rotated"
        )
    mlx, table = fields.nested("quantization"), fields.nested("quantization_config")
    if mlx is not None:
        return _mlx(Fields(mlx, f"{where}: quantization"))
    if table is None:
        return Quantization()
    inner = Fields(table, f"{where}: quantization_config")
    method = inner.get("quant_method")
    if method is None and "bits" in table and "group_size" in table:
        return _mlx(inner)  # mlx-lm writes the same table under both keys
    if method not in ("bitnet", NATIVE_METHOD):
        raise UnsupportedModelError(
            f"[config] {where}: quant_method is {shown(method)}; {_SUPPORTED}. Give the model's original checkpoint"
        )
    kept = _modules(inner)
    return _native(inner, kept) if method == NATIVE_METHOD else _bitnet(inner, kept)


def _rotation(value: Any, key: str = "") -> str | None:
    """The key of a config that says that a Hadamard rotation is to be applied, wherever it stands, or None."""
    if isinstance(value, dict):
        found = (_rotation(inner, f"{key}.{name}".lstrip(".")) for name, inner in value.items())
        return next((name for name in found if name is not None), None)
    if isinstance(value, list):
        return next((name for inner in value if (name := _rotation(inner, key)) is not None), None)
    said = isinstance(value, str) and "hadamard" in value.lower()
    return shown(key) if said or (value and "hadamard" in key.lower()) else None


def _modules(fields: Fields) -> tuple[str, ...] | None:
    value = fields.get("modules_to_not_convert")
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise fields.wrong("modules_to_not_convert", "a list of module names or null is needed")
    for entry in value:
        try:
            re.compile(rf"(?:{entry})")
        except re.error as error:
            raise FormatError(
                f"[config] {fields.where}: modules_to_not_convert has {shown(entry)}, "
                f"which is no regular expression ({error}); names are read as such"
            ) from error
    return tuple(value)


def _bitnet(fields: Fields, kept: tuple[str, ...] | None) -> Quantization:
    kind = fields.text("linear_class", "bitlinear")
    if kind not in ("bitlinear", "autobitlinear"):
        raise UnsupportedModelError(
            f"[config] {fields.where}: linear_class is {shown(kind)}; bitlinear (w = t / weight_scale) and "
            "autobitlinear (w = t * weight_scale) are supported"
        )
    mode = fields.text("quantization_mode", "offline")
    if mode not in ("offline", "online"):
        raise UnsupportedModelError(
            f"[config] {fields.where}: quantization_mode is {shown(mode)}; offline and online are supported"
        )
    norm = "rms_norm" if fields.flag("use_rms_norm", False) else None
    eps = fields.number("rms_norm_eps", 1e-6)
    # bitlinear has no online form: transformers reads packed weights whatever the mode says.
    if kind == "autobitlinear" and mode == "online":
        return Quantization("online", False, kept, linear_norm=norm, linear_norm_eps=eps)
    return Quantization("packed", kind == "bitlinear", kept, linear_norm=norm, linear_norm_eps=eps)


def _mlx(fields: Fields) -> Quantization:
    """MLX's own quantisation, of which the 2-bit affine form can hold ternary weights."""
    bits, group, mode = fields.get("bits"), fields.get("group_size"), fields.get("mode")
    if bits != 2 or isinstance(bits, bool) or group not in (64, 128) or mode not in (None, "affine"):
        raise UnsupportedModelError(
            f"[config] {fields.where}: {shown(fields.table)}; {_SUPPORTED}. Give the model's original checkpoint"
        )
    others = {key: value for key, value in fields.table.items() if key not in ("bits", "group_size", "mode")}
    same = ({"bits": bits, "group_size": group}, False)
    tables = {key: value for key, value in others.items() if key in _TABLES and value not in same}
    heads = {
        value.get("bits") for value in tables.values() if isinstance(value, dict) and value.get("group_size") == 64
    }
    whole = len(heads) == 1 and heads <= {8, 6, 4} and all(isinstance(value, dict) for value in tables.values())
    differing = [key for key, value in others.items() if value not in same and not (whole and key in tables)]
    if differing:
        raise UnsupportedModelError(
            f"[config] {fields.where}: {', '.join(map(shown, differing))} is quantised otherwise than the rest; 2 bits in "
            "groups of 64 or 128, or floats, are read, and embedding and head of 8, 6 or 4 bits in groups of 64"
        )
    return Quantization("mlx", False, (), 16, heads.pop() if whole else None, group=group)


def _native(fields: Fields, kept: tuple[str, ...] | None) -> Quantization:
    name, version = fields.get("format"), fields.get("format_version")
    if name not in NATIVE_FORMATS or version != NATIVE_VERSION or isinstance(version, bool):
        raise UnsupportedModelError(
            f"[config] {fields.where}: format {shown(name)} version {shown(version)}; "
            f"{' and '.join(NATIVE_FORMATS)} version {NATIVE_VERSION} are read here. "
            "A newer bitnet-mlx may have written it: upgrade"
        )
    bits = fields.size("activation_bits", 8)
    if bits not in (8, 16):
        raise fields.wrong("activation_bits", "8 or 16 is allowed")
    head = fields.size("head_bits", 16)
    if head not in (32, 16, 8, 6, 4, 2):
        raise fields.wrong("head_bits", "16, 8, 6, 4 or 2 (ternary) is allowed")
    return Quantization(
        name, False, kept, bits, head if head < 16 else None,
        "norm" if fields.flag("linear_norms", False) else None, fields.number("linear_norm_eps", 1e-6),
    )  # fmt: skip
