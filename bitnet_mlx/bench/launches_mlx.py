"""Kernel launches of one layer in a decode step, counted from MLX's graph, copies and cache writes included.

A graph is traced by mx.export_function, which needs no GPU, and its nodes are counted by what MLX's GPU back ends do:

  views      reshapes, transpositions, slices, splits and broadcasts launch nothing. A reshape of data that does not lie
             so that it can be seen in the new shape copies: 1. Strides are followed through the graph (by views of
             numpy arrays that are never written), so that it is known when.
  copies     a custom kernel, a product and an attention copy each input that they need contiguous and is not: 1 each.
             (Attention reads queries, keys and values in the layouts that a cache gives them.)
  writes     an update of a slice writes in place: 1. A concatenation copies each of its parts: 1 each.
  the rest   1 each. RMSNorm, RoPE and attention of mx.fast are one kernel each, as on Metal; MLX on a CPU would spell
             them out, so a stand-in takes their place while tracing. (Attention takes a second pass of its own where
             thousands of positions are held; that is not counted.)

Nothing is fused by mx.compile here. That concerns the plain graphs' element-wise operations alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from bitnet_mlx.backends.mlx_import import mx

_VIEWS = {"Reshape", "Flatten", "Unflatten", "ExpandDims", "Squeeze"}
_SAME = {"StopGradient", "CustomTransforms", "Copy", "Depends"}  # outputs share their inputs' memory
_ROW_CONTIGUOUS = {"Matmul", "QuantizedMatmul", "AddMM", "GatherMM", "Gather", "Reduce", "Scan", "ArgReduce"}
_CONTIGUOUS_INPUTS = {"QuantizedMatmul", "Matmul", "AddMM"}
_PREFIX = "custom_kernel_"
_STAND_IN = "bitnet_stand_in_"
_ADDED = re.compile(r"_+([0-9a-f]{16}|float|bfloat|half|T_|True|False|[0-9]).*")


def launches(function: Callable[..., Any], *arguments: mx.array) -> list[str]:
    """The launches of function(*arguments), by name, in the graph's order. Inputs count as contiguous."""
    records: list[dict[str, Any]] = []
    with _stand_ins():
        mx.export_function(records.append, function, *arguments)
    held: dict[str, np.ndarray] = {}
    found: list[str] = []
    for record in records:
        if record["type"] == "inputs":
            held.update((name, _dummy(shape)) for name, shape, _ in record["inputs"])
        elif record["type"] == "constants":
            held.update((name, _dummy(array.shape)) for name, array in record["constants"])
        elif record["type"] == "primitive":
            found += _follow(record, held)
    return found


def _dummy(shape: Sequence[int]) -> np.ndarray:
    """A contiguous array whose strides are followed; one byte an element, never touched."""
    return np.empty(tuple(shape), np.int8)


def _follow(node: dict[str, Any], held: dict[str, np.ndarray]) -> list[str]:
    """Put the node's outputs among `held`; its launches."""
    name, arguments = node["name"], node["arguments"]
    inputs = [held[n] for n, _, _ in node["inputs"]]
    shapes = [tuple(shape) for _, shape, _ in node["outputs"]]
    outputs, count = _views(name, arguments, inputs, shapes)
    if outputs is None:
        outputs, count = [_written(inputs, shape) for shape in shapes], _launched(name, arguments, inputs)
        if name in _ROW_CONTIGUOUS or name == "CustomKernel":
            outputs = [_dummy(shape) for shape in shapes]
    held.update((n, array) for (n, _, _), array in zip(node["outputs"], outputs, strict=True))
    label = _label(name, arguments)
    return [label] + [f"copy for {label}"] * (count - 1) if count else []


def _views(
    name: str, arguments: list[Any], inputs: list[np.ndarray], shapes: list[tuple[int, ...]]
) -> tuple[list[np.ndarray] | None, int]:
    """(outputs, copies) of a node that gives views; (None, 0) for others."""
    if name in _VIEWS:
        try:
            return [_seen_as(inputs[0], shapes[0])], 0
        except ValueError:
            return [_dummy(shapes[0])], 1
    if name in _SAME:
        return inputs[: len(shapes)], 0
    if name == "Transpose":
        return [inputs[0].transpose(arguments[0])], 0
    if name == "Broadcast":
        return [np.broadcast_to(inputs[0], shapes[0])], 0
    if name == "Slice":
        start, stop, step = arguments
        return [inputs[0][tuple(slice(*bounds) for bounds in zip(start, stop, step, strict=True))]], 0
    if name == "Split":
        at, axis = arguments
        return list(np.split(inputs[0], list(at), axis)), 0
    if name == "View" and inputs[0].shape == shapes[0]:
        return inputs, 0
    return None, 0


def _seen_as(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The array in another shape without a copy; ValueError where that cannot be."""
    view = array.view()
    try:
        view.shape = shape
    except AttributeError as error:  # numpy's word for it
        raise ValueError(str(error)) from error
    return view


def _written(inputs: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """What an element-wise operation writes: in its inputs' order where they lie densely in the same one."""
    full = [x for x in inputs if x.shape == shape and any(x.strides)]  # a single number, broadcast, has no order
    dense = [x for x in full if x.transpose(np.argsort([-s for s in x.strides], kind="stable")).flags.c_contiguous]
    if full and len(dense) == len(full) and len({x.strides for x in full}) == 1:
        return np.empty_like(full[0])
    return _dummy(shape)


def _launched(name: str, arguments: list[Any], inputs: list[np.ndarray]) -> int:
    """How many kernels a node that computes launches."""
    if name == "Concatenate":
        return sum(x.size > 0 for x in inputs)
    if name in _CONTIGUOUS_INPUTS:
        return 1 + sum(not _readable(x, name) for x in inputs)
    if name == "CustomKernel":
        if arguments[0].startswith(f"{_PREFIX}{_STAND_IN}attention"):
            return 1 + (not _query(inputs[0])) + sum(not _keys(x) for x in inputs[1:3])
        if arguments[0].startswith(f"{_PREFIX}{_STAND_IN}"):
            return 1
        return 1 + sum(not x.flags.c_contiguous for x in inputs)
    return 1


def _readable(x: np.ndarray, name: str) -> bool:
    """Whether a product reads x where it lies: a dense product takes a transposed matrix as well."""
    return x.flags.c_contiguous or (name != "QuantizedMatmul" and x.ndim > 1 and x.swapaxes(-1, -2).flags.c_contiguous)


def _query(q: np.ndarray) -> bool:
    """[B, heads, L, D]: contiguous, or L and heads exchanged in a batch of one (or heads of one)."""
    return q.flags.c_contiguous or ((q.shape[0] == 1 or q.shape[1] == 1) and q.transpose(0, 2, 1, 3).flags.c_contiguous)


def _keys(k: np.ndarray) -> bool:
    """[B, heads, T, D]: rows contiguous, sequences as far apart as their heads make them."""
    b, heads = k.shape[:2]
    return k.strides[3] == 1 and (b == 1 or heads == 1 or k.strides[0] == heads * k.strides[1])


def _label(name: str, arguments: list[Any]) -> str:
    if name != "CustomKernel":
        return name
    # MLX adds the template's values to a kernel's name, and we a hash of its text.
    return _ADDED.sub("", str(arguments[0]).removeprefix(_PREFIX).removeprefix(_STAND_IN))


@contextmanager
def _stand_ins() -> Iterator[None]:
    """While tracing, mx.fast's norm, rotation and attention are one node each. One thread at a time."""

    def stand_in(name: str, inputs: list[mx.array]) -> mx.array:
        kernel: Any = mx.fast.metal_kernel(
            name=f"{_STAND_IN}{name}",
            input_names=[f"in{i}" for i in range(len(inputs))],
            output_names=["out"],
            source="out[0] = in0[0];",
            ensure_row_contiguous=False,
        )
        first = inputs[0]
        return kernel(
            inputs=inputs,
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
            output_shapes=[first.shape],
            output_dtypes=[first.dtype],
            stream=mx.gpu,
        )[0]

    def norm(x: mx.array, weight: mx.array | None, _eps: float, **_: Any) -> mx.array:
        return stand_in("rms_norm", [x] if weight is None else [x, weight])

    def attention(q: mx.array, k: mx.array, v: mx.array, **_: Any) -> mx.array:
        return stand_in("attention", [q, k, v])

    replaced: list[tuple[Any, str, Any]] = [
        (mx.fast, "rms_norm", norm),
        (mx.fast, "rope", lambda x, *_, **__: stand_in("rope", [x])),
        (mx.fast, "scaled_dot_product_attention", attention),
        (mx, "default_device", lambda: mx.gpu),  # for operations that go another way on the CPU
    ]
    kept = [getattr(owner, name) for owner, name, _ in replaced]
    try:
        for owner, name, value in replaced:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name, _), value in zip(replaced, kept, strict=True):
            setattr(owner, name, value)
