"""One launch of a kernel as plain data: it names no device, so the tests' emulated grid, Metal and CUDA run the very same one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bitnet_mlx.backends.kernels.source import KernelSource

Value = int | bool | str  # a template's value; a string is a dtype's name


@dataclass(frozen=True)
class Launch:
    """source: the kernel. inputs: arrays in the order of source.inputs, row-contiguous. template: names and values.

    grid: threads in x, y, z. threadgroup: threads of one threadgroup. outputs: (shape, dtype's name) of each output.
    """

    source: KernelSource
    inputs: tuple[Any, ...]
    template: tuple[tuple[str, Value], ...]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    outputs: tuple[tuple[tuple[int, ...], str], ...]


def whole(count: int, step: int) -> int:
    """count rounded up to a multiple of step: a grid's extent, so that no threadgroup is a part of one."""
    return -(-count // step) * step
