"""What a format must offer to be written, and what all formats share: casts, seals, rows of embeddings and heads."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from bitnet_mlx.checkpoint.pages import release
from bitnet_mlx.checkpoint.safetensors_writer import Pending, pending
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


class Target(Protocol):
    """A format that a model can be written in, for one model and one set of options."""

    format: str
    notices: list[str]

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

    def config(self, kept: list[str], activation_bits: int) -> dict[str, Any]:
        """config.json. kept: linears that are not ternary."""
        ...


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


def base_config(source: Mapping[str, Any], weights: DecoderWeights, dtype: str) -> dict[str, Any]:
    """A config.json without what described its old storage; both spellings of the rotary base, tying as it is."""
    config = {key: value for key, value in source.items() if key not in _DROPPED}
    config["dtype"] = config["torch_dtype"] = dtype
    config["tie_word_embeddings"] = weights.lm_head is weights.embed_tokens
    config.setdefault("rope_theta", weights.config.rope.rope_theta)
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
    for array in [*arrays, *(extra for extra in (linear.bias, getattr(linear, "norm", None)) if extra is not None)]:
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
