"""One launch of a kernel as plain data, and its run through MLX.

A launch names no device, so that the emulator of the tests, Metal and CUDA run the very same one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from bitnet_mlx.backends.kernels.source import KernelSource, Platform
from bitnet_mlx.backends.mlx_import import mx
from bitnet_mlx.errors import BackendError

Value = int | bool | str  # a template's value; a string is a dtype's name
DTYPES = {
    "float32": mx.float32,
    "float16": mx.float16,
    "bfloat16": mx.bfloat16,
    "int8": mx.int8,
    "int32": mx.int32,
    "uint32": mx.uint32,
}


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


def run(launch: Launch, platform: Platform, **options: Any) -> list[mx.array]:
    """Add the launch to MLX's graph; returns its outputs, not evaluated.

    options go to MLX's kernel call: verbose=True prints the text that MLX generates, stream= names another stream.
    """
    kernel = built(launch.source, platform)
    return kernel(
        inputs=list(launch.inputs),
        template=[(name, DTYPES[value] if isinstance(value, str) else value) for name, value in launch.template],
        grid=launch.grid,
        threadgroup=launch.threadgroup,
        output_shapes=[shape for shape, _ in launch.outputs],
        output_dtypes=[DTYPES[dtype] for _, dtype in launch.outputs],
        **options,
    )


@lru_cache(maxsize=128)
def built(source: KernelSource, platform: Platform) -> Callable[..., list[mx.array]]:
    """MLX's callable for a kernel, made once. MLX compiles the text when a launch of it is first evaluated."""
    if platform not in source.platforms:
        raise BackendError(
            f"[kernels] {source.name} has no form for {platform}; it has one for {', '.join(source.platforms)}"
        )
    arguments = {
        "name": f"{source.name}_{source.digest(platform)}",
        "input_names": list(source.inputs),
        "output_names": list(source.outputs),
        "source": source.body_text(),
        "header": source.header_text(platform),
    }
    if platform == "metal":
        return mx.fast.metal_kernel(**arguments)
    return mx.fast.cuda_kernel(**arguments, shared_memory=source.shared_memory)


def whole(count: int, step: int) -> int:
    """count rounded up to a multiple of step: a grid's extent, so that no threadgroup is a part of one."""
    return -(-count // step) * step


def template(values: Sequence[tuple[str, Value]] = (), /, **more: Value) -> tuple[tuple[str, Value], ...]:
    """A template's names and values, in order."""
    return (*values, *more.items())
