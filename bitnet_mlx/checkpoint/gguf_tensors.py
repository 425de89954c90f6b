"""One tensor of a GGUF file -> what runs: checks of type, shape and values, then a view of the file or a conversion."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from bitnet_mlx.checkpoint import gguf_types
from bitnet_mlx.checkpoint.gguf_file import GgufFile
from bitnet_mlx.checkpoint.tensors import finite
from bitnet_mlx.errors import FormatError
from bitnet_mlx.formats import ggml_floats, i2s, q2, tq
from bitnet_mlx.formats.block_scales import collapse
from bitnet_mlx.formats.dense import DenseRows
from bitnet_mlx.formats.strict_json import shown
from bitnet_mlx.ternary import TernaryTensor

_PLAIN = {"F32": ("<f4", "float32"), "F16": ("<f2", "float16"), "BF16": ("<u2", "bfloat16")}
_AT_ONCE = 1 << 18  # values converted at a time


def damaged(file: GgufFile, name: str, text: str) -> FormatError:
    """A FormatError about one tensor."""
    return FormatError(f"[gguf] {file.path}: tensor {shown(name)} {text}")


def expect(file: GgufFile, name: str, shape: tuple[int, ...]) -> None:
    """Raise FormatError where a tensor has another shape."""
    info = file.tensors[name]
    if info.shape != shape:
        raise damaged(file, name, f"is {info}; {list(shape)} is needed, as the metadata has it. The file is damaged")


def vector(file: GgufFile, name: str, size: int) -> np.ndarray:
    """A norm, a bias or a scale: finite floats [size] -> float32, in memory of its own."""
    expect(file, name, (size,))
    kind = file.tensors[name].kind
    _check_finite(file, name, file.array(name).view(_PLAIN[kind][0]), kind)
    return ggml_floats.to_float32(file.array(name)[None], kind)[0]


def rows(file: GgufFile, name: str, shape: tuple[int, int], layout: str | None = None) -> DenseRows | TernaryTensor:
    """A matrix of any type that is read: plain floats as they lie in the file, blocks of integers as float32.

    layout: of I2_S, which is the caller's to find.
    """
    kind = file.tensors[name].kind
    if kind in gguf_types.TERNARY:
        return ternary(file, name, shape, layout)
    expect(file, name, shape)
    if kind in _PLAIN:
        view, dtype = _PLAIN[kind]
        array = file.array(name).view(view).reshape(shape)
        _check_finite(file, name, array, kind)
        return DenseRows(array.astype(array.dtype.newbyteorder("="), copy=False), dtype)
    blocks = BlockRows(file, name, shape)
    out = np.empty(shape, np.float32)
    for part in row_blocks(*shape):
        out[part] = blocks.rows(part)
    file.release(name)
    return DenseRows(out, "float32")


class BlockRows:
    """A matrix in blocks of small integers (Q8_0, Q6_K, Q4_0), which becomes floats a few rows at a time."""

    def __init__(self, file: GgufFile, name: str, shape: tuple[int, int]) -> None:
        expect(file, name, shape)
        self._shape = shape
        self._file, self._name, self._data = file, name, file.array(name).reshape(shape[0], -1)

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    def rows(self, index: slice) -> np.ndarray:
        """The chosen rows as float32 [.., K]; FormatError where one is not finite."""
        values = ggml_floats.to_float32(self._data[index], self._file.tensors[self._name].kind)
        _check_finite(self._file, self._name, values, "F32")
        return values


def ternary(file: GgufFile, name: str, shape: tuple[int, int], layout: str | None = None) -> TernaryTensor:
    """A ternary matrix. layout: of I2_S. Equal scales of all blocks become the tensor's; else rows' or groups'."""
    expect(file, name, shape)
    (n, k), kind, where = shape, file.tensors[name].kind, f"{name} in {file.path}"
    if kind == "I2_S":
        assert layout is not None, "the reader finds the layout before it reads"
        words, scale = i2s.to_words2(file.array(name), n, k, layout, where)
        found = TernaryTensor(words, np.asarray(scale, np.float32), shape)
    elif kind == "Q2_0":
        group = q2_group(file)
        words, d = q2.to_words2(file.region(name, q2.nbytes(n, k, group)).reshape(n, -1), k, group, where)
        found = TernaryTensor(words, collapse(d, words, group, where), shape)
    else:
        words, d = tq.to_words2(file.array(name).reshape(n, -1), k, kind, where)
        found = TernaryTensor(words, collapse(d, words, tq.BLOCK, where), shape)
    file.release(name)
    return found


def q2_group(file: GgufFile) -> int:
    """64 or 128: the group that the sizes of all Q2_0 tensors of the file allow. Raises FormatError where none does."""
    groups = set(q2.GROUPS)
    for name, info in file.tensors.items():
        if info.kind != "Q2_0":
            continue
        n, k = int(np.prod(info.shape[:-1])), info.shape[-1]
        groups &= set(q2.possible_groups(n, k, info.room, file.alignment))
        if not groups:
            sizes = " or ".join(f"{q2.nbytes(n, k, g)} (groups of {g})" for g in q2.GROUPS if k % g == 0)
            raise damaged(file, name, f"is {info} and has {info.room} bytes; {sizes or 'another row length'} is needed")
    if len(groups) > 1:
        raise FormatError(f"[gguf] {file.path}: the Q2_0 tensors are too small to tell groups of 64 from groups of 128")
    return groups.pop()


def scaled(weight: TernaryTensor, factor: np.float32) -> TernaryTensor:
    """The weight with a factor of its own tensor ("attn_q.scale") multiplied in."""
    return replace(weight, scale=np.asarray(weight.scale * factor, np.float32))


def unpermuted(array: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows [heads * D, ...] of llama.cpp's order (0, D/2, 1, D/2 + 1, ...) -> Hugging Face's (0, 1, ..., D - 1)."""
    pairs = array.reshape(-1, head_dim // 2, 2, *array.shape[1:])
    return np.ascontiguousarray(np.swapaxes(pairs, 1, 2)).reshape(array.shape)


def unpermuted_rows(weight: TernaryTensor | DenseRows, head_dim: int) -> TernaryTensor | DenseRows:
    """`unpermuted` for a matrix of q or k, with the scales that go with its rows."""
    if isinstance(weight, DenseRows):
        return DenseRows(unpermuted(weight.data, head_dim), weight.dtype)
    scale = weight.scale if weight.scale.ndim == 0 else unpermuted(weight.scale, head_dim)
    return replace(weight, words=unpermuted(weight.words, head_dim), scale=scale)


def row_blocks(n: int, k: int) -> Iterator[slice]:
    """Slices of rows of about _AT_ONCE values."""
    step = max(1, _AT_ONCE // k)
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def _check_finite(file: GgufFile, name: str, array: np.ndarray, kind: str) -> None:
    if not finite(array, kind):
        raise damaged(file, name, "holds NaN or infinity; only finite values are allowed. The file is damaged")
