"""The Metal text that MLX generates for a launch: MLX prints it while a call is traced, which needs no GPU."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from bitnet_mlx.backends.kernels import run
from bitnet_mlx.backends.kernels.launch import Launch
from bitnet_mlx.backends.kernels.source import KernelSource
from bitnet_mlx.backends.mlx_import import mx

Shapes = tuple[tuple[tuple[int, ...], str], ...]


def generated_text(launch: Launch) -> str:
    """The text, from MLX's header to the template's instantiation."""
    inputs = tuple((tuple(x.shape), dtype_name(x)) for x in launch.inputs)
    return _text(launch.source, inputs, launch.template, launch.outputs)


def dtype_name(x: Any) -> str:
    """An array's dtype as MLX and numpy call it: "float32", "bfloat16"."""
    return str(x.dtype).removeprefix("mlx.core.")


@lru_cache(maxsize=256)
def _text(source: KernelSource, inputs: Shapes, template: tuple[Any, ...], outputs: Shapes) -> str:
    arrays = tuple(mx.zeros(_small(shape), run.DTYPES[dtype]) for shape, dtype in inputs)
    small = tuple((_small(shape), dtype) for shape, dtype in outputs)
    launch = Launch(source, (), template, (32, 1, 1), (32, 1, 1), small)

    def call(*given: Any) -> Any:
        traced = Launch(launch.source, given, launch.template, launch.grid, launch.threadgroup, launch.outputs)
        return run.run(traced, "metal", verbose=True, stream=mx.gpu)[0]

    return printed_text(call, *arrays)


def printed_text(call: Any, *arrays: Any) -> str:
    """The text that MLX prints while `call(*arrays)` is traced: of one kernel called with verbose=True, stream=mx.gpu."""
    with tempfile.TemporaryDirectory() as scratch, _caught_output() as caught:
        mx.export_function(os.path.join(scratch, "traced.mlxfn"), call, *arrays)
        printed = caught()
    match = re.search(r"^Generated source code for `.*`:\n```\n(.*)\n```\n", printed, re.DOTALL | re.MULTILINE)
    assert match, f"MLX printed no kernel: {printed[:300]!r}"
    return match[1]


def _small(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape of as many dimensions, with fewer than 8 elements if and only if the given one has: all that the text tells."""
    count = 1
    for n in shape:
        count *= n
    if count < 8 or not shape:
        return shape
    return (8,) + (1,) * (len(shape) - 1)


@contextmanager
def _caught_output() -> Iterator[Any]:
    """What C++ writes to the standard output, kept in a file instead; yields a function that reads it."""
    with tempfile.TemporaryFile() as file:
        sys.stdout.flush()
        kept = os.dup(1)
        os.dup2(file.fileno(), 1)

        def read() -> str:
            file.seek(0)
            return file.read().decode()

        try:
            yield read
        finally:
            os.dup2(kept, 1)
            os.close(kept)


@lru_cache(maxsize=1)
def mlx_headers() -> Path:
    """The folder that MLX's own kernel headers lie in."""
    return Path(mx.__file__).parent / "include"
