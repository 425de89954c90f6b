"""What a format must offer to be written, and what all formats share: casts, seals, rows of embeddings and heads."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bitnet_mlx.checkpoint.folder import SINGLE
from bitnet_mlx.checkpoint.pages import release
from bitnet_mlx.checkpoint.read import open_weights
from bitnet_mlx.checkpoint.safetensors_file import SafetensorsFile
from bitnet_mlx.checkpoint.safetensors_writer import ENTRY_ROOM, Pending, SafetensorsStream, pending
from bitnet_mlx.checkpoint.tensors import row_blocks
from bitnet_mlx.errors import ConfigError, FormatError
from bitnet_mlx.formats.dense import (
    DenseRows,
    GroupedRows,
    bfloat16_to_float32,
    float32_to_bfloat16,
    quantize_rows,
)
from bitnet_mlx.models.config import DecoderConfig
from bitnet_mlx.models.weights import DecoderWeights, Linear, Matrix
from bitnet_mlx.ternary import TernaryTensor

EMBED, HEAD = "model.embed_tokens", "lm_head"
FILE_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# Keys of a config.json that describe another storage, or code that is never run.
_DROPPED = ("quantization_config", "quantization", "auto_map", "is_bitnet_config", "torch_dtype", "dtype")


class Sink(Protocol):
    """What takes tensors one after another."""

    def add(self, tensor: Pending) -> None: ...


class Bytes(Protocol):
    """A written file's tensors, as they lie in it."""

    def array(self, name: str) -> np.ndarray: ...
    def release(self, name: str) -> None: ...


class Target(Protocol):
    """A format that a model can be written in, for one model and one set of options.

    file: the name of the weight file. notices: what a user should know. whole: whether the file alone is the model.
    """

    format: str
    file: str
    whole: bool
    notices: list[str]

    def stream(self, path: Path, seen: Callable[[str, np.ndarray], None]) -> AbstractContextManager[Sink]:
        """Opens the weight file for writing. seen: called with each block that is written, and its tensor's name."""
        ...

    def linear(self, module: str, linear: Linear) -> tuple[list[Pending], Linear]:
        """The tensors of one linear, and the linear as it will be read back. Raises FormatError where the format cannot
        hold it. Called by several threads."""
        ...

    def table(self, module: str, rows: Matrix) -> Iterator[Pending]:
        """The tensors of the embedding or the head, each to be written before the next is asked for."""
        ...

    def norm(self, module: str, norm: np.ndarray) -> Pending:
        """The tensor of a norm."""
        ...

    def extra(self) -> list[Pending]:
        """Tensors that no weight stands for."""
        ...

    def finish(self, folder: Path, kept: list[str], activation_bits: int) -> None:
        """Write what lies beside the weights. kept: linears that are not ternary."""
        ...

    def opened(self, path: Path) -> Bytes:
        """The weight file, to be compared byte for byte."""
        ...

    def reopen(self, folder: Path) -> Mapping[str, Linear]:
        """The linears, read back. Raises FormatError where what was written makes another model."""
        ...


class FolderTarget(ABC):
    """What formats of config.json and safetensors share. Floats are kept as they are, or cast to `dtype`."""

    format, file, whole = "", SINGLE, False

    def __init__(self, weights: DecoderWeights, source: Mapping[str, Any], dtype: str | None) -> None:
        """source: the config.json that the model came with. Raises ConfigError for a dtype that does not suit it."""
        self.weights, self.source, self.notices = weights, source, list[str]()
        self.dtype = dtype and check_dtype(dtype, weights.config)

    def stream(self, path: Path, seen: Callable[[str, np.ndarray], None]) -> SafetensorsStream:
        modules = [EMBED, HEAD, *self.weights.linears, *self.weights.norms]
        room = sum(4 * (len(module) + ENTRY_ROOM + 16) for module in modules) + 1024
        return SafetensorsStream(path, room, {"bitnet_mlx": self.format}, seen)

    def extra(self) -> list[Pending]:
        return []

    def finish(self, folder: Path, kept: list[str], activation_bits: int) -> None:
        config = self.config(kept, activation_bits)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @abstractmethod
    def config(self, kept: list[str], activation_bits: int) -> dict[str, Any]:
        """config.json. kept: linears that are not ternary."""

    def opened(self, path: Path) -> SafetensorsFile:
        return SafetensorsFile(path)

    def reopen(self, folder: Path) -> Mapping[str, Linear]:
        found = open_weights(folder)
        check_config(found.config, self.weights.config)
        return found.linears


def cast(x: np.ndarray, dtype: str) -> np.ndarray:
    """float32 -> float32, float16, or bfloat16 as uint16. A value that float16 cannot hold becomes infinite."""
    if dtype == "bfloat16":
        return float32_to_bfloat16(x)
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(x, np.float16 if dtype == "float16" else np.float32)


def uncast(x: np.ndarray) -> np.ndarray:
    """What `cast` made -> float32."""
    return bfloat16_to_float32(x) if x.dtype == np.uint16 else x.astype(np.float32)


def narrowed(x: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """cast, refused by name where values are lost to infinity, or all of a scale to zero."""
    y = cast(x, dtype)
    back = uncast(y)
    if not np.isfinite(back).all() or bool(((back == 0) & (x != 0)).any() and name.endswith("scale")):
        raise FormatError(
            f"[convert] {name} holds {float(np.abs(x).max()):g} down to {float(np.abs(x).min()):g}, which {dtype} cannot "
            "hold; give --dtype float32"
        )
    return y


def exact_dtype(x: np.ndarray, dtype: str) -> str:
    """`dtype` where it holds every value exactly, else float32."""
    return dtype if np.array_equal(uncast(cast(x, dtype)), x) else "float32"


def floats(name: str, x: np.ndarray, dtype: str) -> Pending:
    """A vector of floats in a dtype."""
    return pending(name, narrowed(x, dtype, name), FILE_DTYPES[dtype])


def dense_rows(name: str, rows: Matrix, dtype: str | None) -> Pending:
    """A matrix as floats, block by block. dtype: None keeps a float matrix's own and makes others float32."""
    own = rows.dtype if isinstance(rows, DenseRows) else None
    chosen = dtype or own or "float32"

    def blocks() -> Iterator[np.ndarray]:
        for part in blocks_of(rows.shape):
            if isinstance(rows, DenseRows) and chosen == own:
                yield rows.data[part]
                release(rows.data[part])
            else:
                yield narrowed(rows.rows(part), chosen, name)
                forget(rows, part)

    return Pending(name, FILE_DTYPES[chosen], rows.shape, blocks)


def grouped_rows(rows: Matrix, bits: int) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """(rows, codes int8, scales float32) in blocks: the file's own where it has these bits, else quantised."""
    for part in blocks_of(rows.shape):
        if isinstance(rows, GroupedRows) and rows.bits == bits:
            yield part, rows.codes[part], rows.scales[part]
        else:
            done = quantize_rows(rows.rows(part), bits)
            yield part, done.codes, done.scales
        forget(rows, part)


def made(scales: np.ndarray) -> np.ndarray:
    """Scales that `grouped_rows` has given all of; they begin as NaN."""
    assert np.isfinite(scales).all()
    return scales


def blocks_of(shape: tuple[int, int]) -> Iterator[slice]:
    """Rows in blocks of some 256,000 values."""
    return row_blocks(np.broadcast_to(np.int8(0), shape))


def forget(rows: Matrix, part: slice) -> None:
    """Pages of rows that will not be read again may leave memory."""
    if isinstance(rows, DenseRows):
        release(rows.data[part])
    elif isinstance(rows, GroupedRows):
        release(rows.codes[part])
        release(rows.scales[part])


def head_choice(rows: Matrix, asked: int | None, default: int) -> int:
    """Bits of the embedding or head: what was asked for; else what the file has where that is less than the default."""
    stored = rows.bits if isinstance(rows, GroupedRows) else 16
    return min(stored, default) if asked is None else asked


# What a config may say differently without changing a logit.
_FREE = ("dtype", "activation_bits", "bos_token_id", "eos_token_ids", "pad_token_id", "tie_word_embeddings")


def check_config(found: DecoderConfig, wanted: DecoderConfig) -> None:
    """Raise FormatError where the config written makes another model than the weights' own."""
    for key, value in asdict(wanted).items():
        other = asdict(found)[key]
        if key not in _FREE and other != value:
            raise FormatError(
                f"[write] the source config makes {key} {other!r}, but the weights' own config has {value!r}"
            )


def base_config(source: Mapping[str, Any], weights: DecoderWeights, dtype: str) -> dict[str, Any]:
    """A config.json without what described its old storage; both spellings of the rotary base, tying as it is."""
    config = {key: value for key, value in source.items() if key not in _DROPPED}
    config["dtype"] = config["torch_dtype"] = dtype
    config["tie_word_embeddings"] = weights.lm_head is weights.embed_tokens
    config.setdefault("rope_theta", weights.config.rope.rope_theta)
    newer = config.get("rope_parameters")
    if newer and not config.get("rope_scaling") and weights.config.rope.rope_type != "default":
        config["rope_scaling"] = {key: value for key, value in newer.items() if key != "rope_theta"}
    return config


def check_dtype(dtype: str | None, config: DecoderConfig) -> str:
    """The dtype of floats: as asked, else the checkpoint's own. ConfigError for float16 where it would overflow."""
    if dtype not in (None, *FILE_DTYPES):
        raise ConfigError(f"[convert] dtype is {dtype!r}; {', '.join(FILE_DTYPES)} are allowed")
    if dtype == "float16" and config.hidden_act == "relu2":
        raise ConfigError(
            "[convert] dtype is float16, but this model squares its activations, which can pass 65504, the most that "
            "float16 holds; give bfloat16 or float32"
        )
    return dtype or config.dtype


def seal(linear: Linear) -> bytes:
    """A digest of all that a linear holds."""
    digest = hashlib.sha256()
    w = linear.weight
    if isinstance(w, TernaryTensor):
        arrays = [w.words, w.scale]
    else:
        arrays = [w.codes, w.scales] if isinstance(w, GroupedRows) else [w.data]
    for array in [*arrays, *(extra for extra in (linear.bias, linear.norm) if extra is not None)]:
        digest.update(repr((array.dtype.str, array.shape)).encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.digest()


def scaled(linear: Linear, scale: np.ndarray) -> Linear:
    """The same linear with another scale."""
    assert isinstance(linear.weight, TernaryTensor)
    return replace(linear, weight=replace(linear.weight, scale=scale))


def release_linear(linear: Linear) -> None:
    """Pages of a linear that has been written may leave memory."""
    w = linear.weight
    for array in (w.words, w.scale) if isinstance(w, TernaryTensor) else (getattr(w, "data", None),):
        if array is not None:
            release(array)


def recast(linear: Linear, dtype: str | None) -> Linear:
    """A float linear as it is after `dense_rows` has written it in this dtype."""
    w = linear.weight
    if dtype is None or not isinstance(w, DenseRows) or w.dtype == dtype:
        return linear
    return replace(linear, weight=DenseRows(cast(w.rows(slice(None)), dtype), dtype))
