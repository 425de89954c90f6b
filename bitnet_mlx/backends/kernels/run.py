"""A launch run by MLX, on Metal or CUDA."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from bitnet_mlx.backends.kernels.launch import Launch
from bitnet_mlx.backends.kernels.source import KernelSource, Platform
from bitnet_mlx.backends.mlx_import import mx
from bitnet_mlx.errors import BackendError

DTYPES = {
    "float32": mx.float32,
    "float16": mx.float16,
    "bfloat16": mx.bfloat16,
    "int8": mx.int8,
    "int32": mx.int32,
    "uint32": mx.uint32,
}


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
    name = f"{source.name}_{source.digest(platform)}"
    names: dict[str, Any] = {"input_names": list(source.inputs), "output_names": list(source.outputs)}
    kernel: Any
    if platform == "metal":
        kernel = mx.fast.metal_kernel(name, header=source.header_text(platform), source=source.body_text(), **names)
    else:
        header, body = source.included(platform)
        kernel = mx.fast.cuda_kernel(name, header=header, source=body, shared_memory=source.shared_memory, **names)
    return kernel
