"""mlx-lm's YAML files of LoRA options (its --config): read, with every key taken or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from bitnet_mlx.errors import ConfigError, FormatError
from bitnet_mlx.train.lora_options import LoraOptions

_INNER = ("rank", "scale", "dropout", "keys")
# What mlx-lm takes and a run here does not; null, false and {} ask for nothing.
_REFUSED = {
    "lr_schedule": "the rate rises over `warmup` steps and falls by a cosine; give learning_rate and warmup",
    "optimizer_config": "give weight_decay; the rest is fixed",
    "report_to": "the log is adapter_path/log.jsonl",
    "project_name": "nothing is reported to services",
    "trust_remote_code": "code of models is never run",
    "clear_cache_threshold": "MLX's cache is left to MLX",
    "hf_dataset": "data is a folder with train.jsonl",
    "config": "one file holds all options",
}


def read_options(path: Path) -> dict[str, Any]:
    """The options that a file sets, by LoraOptions' names and of their types. Raises ConfigError or FormatError."""
    import yaml

    try:
        raw = yaml.safe_load(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"[lora] no file {path}; --config takes a YAML file of options") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FormatError(f"[lora] {path} is no YAML: {error}; see mlx-lm's lora_config.yaml") from error
    if not isinstance(raw, Mapping):
        raise FormatError(f"[lora] {path} holds {type(raw).__name__}; options by name are needed, one a line")
    flat = {name: value for name, value in raw.items() if name != "lora_parameters"}
    inner = raw.get("lora_parameters") or {}
    if not isinstance(inner, Mapping) or set(inner) - set(_INNER):
        raise ConfigError(f"[lora] {path}: lora_parameters is {inner!r}; {', '.join(_INNER)} are known")
    kinds = {field.name: str(field.type) for field in fields(LoraOptions)}
    found = {}
    for name, value in {**flat, **inner}.items():
        if name in kinds and value is not None:
            found[name] = _typed(path, name, kinds[name], value)
        elif name not in kinds and (name not in _REFUSED or value not in (None, False, 0, {})):
            why = _REFUSED.get(name, f"{', '.join(sorted(kinds))} and lora_parameters are known")
            raise ConfigError(f"[lora] {path}: {name} is {value!r}, which is not taken here; {why}")
    return found


def _typed(path: Path, name: str, kind: str, value: Any) -> Any:
    """A value of the type that an option has; YAML reads 1e-5 as text."""
    kind = kind.removesuffix(" | None")
    try:
        if kind == "float" and not isinstance(value, bool):
            return float(value)
        if kind == "Path" and isinstance(value, str):
            return Path(value)
        if kind.startswith("tuple") and isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        if type(value).__name__ == kind:
            return value
    except (TypeError, ValueError):
        pass
    raise ConfigError(f"[lora] {path}: {name} is {value!r}; {kind} is needed")
