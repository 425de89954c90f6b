"""Writing a native folder: config.json, one safetensors file of words2, and the tokenizer's files as they were.

The folder is made under a temporary name, read again and compared with what was to be written, and renamed when whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_mlx.checkpoint.folder import SINGLE, TOKENIZER_FILES
from bitnet_mlx.checkpoint.read import read_weights
from bitnet_mlx.checkpoint.safetensors_writer import Pending, pending, write_safetensors
from bitnet_mlx.checkpoint.settle import EMBED, HEAD
from bitnet_mlx.checkpoint.tensors import FLOATS, quantize_in_blocks
from bitnet_mlx.errors import ConfigError, FormatError
from bitnet_mlx.formats.dense import GroupedRows
from bitnet_mlx.models.quantization import NATIVE_FORMAT, NATIVE_METHOD, NATIVE_VERSION
from bitnet_mlx.models.weights import DecoderWeights, Linear, Matrix
from bitnet_mlx.ternary import TernaryTensor

_FILE_DTYPES = {name: key for key, name in FLOATS.items()}  # "bfloat16" -> "BF16"
# Keys that describe another storage, or code that is never run.
_DROPPED = ("quantization_config", "quantization", "auto_map", "is_bitnet_config")
# What a config may say differently without changing a logit.
_FREE = ("dtype", "activation_bits", "bos_token_id", "eos_token_ids", "pad_token_id", "tie_word_embeddings")


def write_native(
    weights: DecoderWeights,
    source_config: dict[str, Any],
    destination: Path | str,
    *,
    copy_from: Path | str | None = None,
    head_bits: int | None = None,
) -> Path:
    """Write a folder that read_weights uses in place.

    source_config: the config.json that the model came with; its storage keys are replaced. copy_from: a folder whose
    tokenizer, template and generation_config files are copied byte for byte. head_bits: 8, 6 or 4 quantise embedding
    and head first; None and 16 write them as they are.

    Returns the destination. Raises ConfigError where it exists and is not empty, FormatError where the weights cannot
    be told by the format; nothing is left behind then.
    """
    destination = Path(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ConfigError(f"[write] {destination} exists and is not an empty folder; give another name or remove it")
    if head_bits not in (None, 32, 16, 8, 6, 4):
        raise ConfigError(f"[write] head_bits is {head_bits!r}; 16, 8, 6 or 4 are allowed")
    if head_bits is not None and head_bits < 16:
        weights = _small_head(weights, head_bits)
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = destination.with_name(f".{destination.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        _copy(copy_from, temporary)
        config = native_config(weights, source_config)
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_safetensors(
            temporary / SINGLE, list(_tensors(weights)), {"bitnet_mlx": f"{NATIVE_FORMAT} {NATIVE_VERSION}"}
        )
        compare(read_weights(temporary), weights)
        if destination.exists():
            destination.rmdir()
        os.replace(temporary, destination)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return destination


def _small_head(weights: DecoderWeights, bits: int) -> DecoderWeights:
    def small(rows: Matrix) -> Matrix:
        if isinstance(rows, TernaryTensor) or getattr(rows, "bits", None) == bits:
            return rows
        return quantize_in_blocks(rows, bits)

    embed = small(weights.embed_tokens)
    head = embed if weights.lm_head is weights.embed_tokens else small(weights.lm_head)
    return replace(weights, embed_tokens=embed, lm_head=head)


def _copy(source: Path | str | None, destination: Path) -> None:
    for name in TOKENIZER_FILES if source is not None else ():
        path = Path(source or "") / name
        if path.is_file():
            shutil.copyfile(path, destination / name)


def native_config(weights: DecoderWeights, source_config: dict[str, Any]) -> dict[str, Any]:
    """config.json of the native folder. FormatError where layers or heads differ in their bits."""
    ternary = [linear.weight for linear in weights.linears.values() if isinstance(linear.weight, TernaryTensor)]
    activations = {weight.activation_bits for weight in ternary}
    heads = {_table_bits(rows) for rows in (weights.embed_tokens, weights.lm_head)}
    if len(activations) > 1 or len(heads) > 1:
        raise FormatError(
            f"[write] layers have {sorted(activations)} activation bits and heads {sorted(heads)} bits; "
            "the native format holds one of each"
        )
    kept = [name for name, linear in weights.linears.items() if not isinstance(linear.weight, TernaryTensor)]
    config = {key: value for key, value in source_config.items() if key not in _DROPPED}
    config["tie_word_embeddings"] = weights.lm_head is weights.embed_tokens
    table = config["quantization_config"] = {
        "quant_method": NATIVE_METHOD,
        "format": NATIVE_FORMAT,
        "format_version": NATIVE_VERSION,
        "activation_bits": activations.pop() if activations else 8,
        "head_bits": heads.pop(),
        "modules_to_not_convert": [HEAD, *kept],
    }
    if _normed(weights):
        table |= {"linear_norms": True, "linear_norm_eps": weights.config.linear_norm_eps}
    return config


def _table_bits(rows: Matrix) -> int:
    """Bits of an embedding or a head as config.json tells them; 2 are ternary."""
    return 2 if isinstance(rows, TernaryTensor) else getattr(rows, "bits", 16)


def _normed(weights: DecoderWeights) -> bool:
    """Whether the ternary linears have norms of their own. FormatError where only some have."""
    found = {linear.norm is not None for linear in weights.linears.values() if isinstance(linear.weight, TernaryTensor)}
    dense = [n for n, x in weights.linears.items() if x.norm is not None and not isinstance(x.weight, TernaryTensor)]
    if len(found) > 1 or dense:
        raise FormatError(
            "[write] some linears have norms of their own and others have none; the native format holds such norms for "
            "all ternary linears and for no float ones"
        )
    return True in found


def _tensors(weights: DecoderWeights) -> Iterator[Pending]:
    yield from _matrix(EMBED, weights.embed_tokens)
    if weights.lm_head is not weights.embed_tokens:
        yield from _matrix(HEAD, weights.lm_head)
    for module, linear in weights.linears.items():
        yield from _matrix(module, linear.weight)
        if linear.bias is not None:
            yield pending(f"{module}.bias", linear.bias)
        if linear.norm is not None:
            yield pending(f"{module}.norm.weight", linear.norm)
    for module, norm in weights.norms.items():
        yield pending(f"{module}.weight", norm)


def _matrix(module: str, matrix: Matrix) -> Iterator[Pending]:
    if isinstance(matrix, TernaryTensor):
        yield pending(f"{module}.weight", matrix.words)
        yield pending(f"{module}.weight_scale", matrix.scale)
    elif isinstance(matrix, GroupedRows):
        if module not in (EMBED, HEAD):
            raise FormatError(f"[write] {module} is in {matrix.bits}-bit groups; linears are ternary or float here")
        yield pending(f"{module}.weight", matrix.codes)
        yield pending(f"{module}.weight_scale", matrix.scales)
    else:
        yield pending(f"{module}.weight", matrix.data, _FILE_DTYPES[matrix.dtype])


def compare(found: DecoderWeights, wanted: DecoderWeights) -> None:
    """Raise FormatError, naming the first tensor that differs, unless both models are equal to the last bit."""
    for key, value in asdict(wanted.config).items():
        other = asdict(found.config)[key]
        if key not in _FREE and other != value:
            raise FormatError(
                f"[write] the source config makes {key} {other!r}, but the weights' own config has {value!r}"
            )
    for name in ("embed_tokens", "lm_head"):
        _equal(name, _arrays(Linear(getattr(found, name))), _arrays(Linear(getattr(wanted, name))))
    for kind in ("linears", "norms"):
        if getattr(found, kind).keys() != getattr(wanted, kind).keys():
            raise FormatError(
                f"[write] the {kind} read back have other names than those written; this is a fault of ours"
            )
    for name, linear in wanted.linears.items():
        _equal(name, _arrays(found.linears[name]), _arrays(linear))
    for name, norm in wanted.norms.items():
        _equal(name, [found.norms[name]], [norm])


def _arrays(linear: Linear) -> list[np.ndarray]:
    w = linear.weight
    if isinstance(w, TernaryTensor):
        arrays = [w.words, w.scale, np.array([w.activation_bits])]
    else:
        arrays = [w.codes, w.scales, np.array([w.bits])] if isinstance(w, GroupedRows) else [w.data]
    return [*arrays, *(v for v in (linear.bias, linear.norm) if v is not None)]


def _equal(name: str, found: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    same = len(found) == len(wanted) and all(
        a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(found, wanted, strict=True)
    )
    if not same:
        raise FormatError(
            f"[write] {name} read back differs from what was written; the disk may be faulty. Nothing was kept"
        )
