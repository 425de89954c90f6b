"""Metal on Linux: the text that MLX generates for a launch, compiled by clang with real address spaces and run on an emulated grid.

emulate(launch)                          the outputs, or an AssertionError that says what the kernel did wrong
emulate(launch, seed=3)                  threads, simdgroups and sums in another order
emulate(launch, edit=("a", "b"))         the text with every "a" replaced by "b": a planted fault
emulate(launch, flags=("split_fma",))    another compiler or chip: see compiler.FLAGS
runner(launch)                           the same for MLX arrays, in place of bitnet_mlx.backends.kernels.run
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bitnet_mlx.backends.kernels.launch import Launch
from bitnet_mlx.backends.mlx_import import mx
from tests.emulator import compiler, grid, trace
from tests.emulator.grid import FaultError
from tests.emulator.instrument import RefusedError
from tests.emulator.text import signature, with_entry
from tests.support.tally import here

__all__ = ["FaultError", "RefusedError", "emulate", "runner", "to_mlx", "to_numpy"]
Edit = Callable[[str], str] | tuple[str, str]


def emulate(
    launch: Launch, *, seed: int = 0, edit: Edit | None = None, flags: tuple[str, ...] = ()
) -> list[np.ndarray]:
    """The launch's outputs. inputs: numpy arrays (ml_dtypes.bfloat16 for bfloat16). Skips the test where there is no clang.

    Raises RefusedError where a Metal compiler would refuse the text or the emulator's rules do, FaultError for what a run shows.
    """
    if reason := compiler.why_not():
        pytest.skip(reason)
    here.tests.add(os.environ.get("PYTEST_CURRENT_TEST", "").rsplit(" (", 1)[0])
    text = edited(trace.generated_text(launch), edit)
    library = compiler.kernel(with_entry(text, grid.POSITIONS), tuple(flags))
    inputs = {name: np.asarray(x) for name, x in zip(launch.source.inputs, launch.inputs, strict=True)}
    outputs = dict(zip(launch.source.outputs, launch.outputs, strict=True))
    buffers = grid.Buffers(inputs, outputs)
    return grid.run(library, signature(text)[1], buffers, launch.grid, launch.threadgroup, seed, tuple(flags))


def edited(text: str, edit: Edit | None) -> str:
    """The text with a fault planted in it. A pair (old, new) must find its place."""
    if edit is None:
        return text
    if callable(edit):
        changed = edit(text)
    else:
        changed = text.replace(*edit)
    assert changed != text, f"the edit {edit} changes nothing"
    return changed


def runner(launch: Launch) -> list[mx.array]:
    """As kernels.run.run, on the emulated grid: MLX arrays in and out."""
    arrays = tuple(to_numpy(x) for x in launch.inputs)
    plain = Launch(launch.source, arrays, launch.template, launch.grid, launch.threadgroup, launch.outputs)
    return [to_mlx(y) for y in emulate(plain)]


def to_numpy(x: Any) -> np.ndarray:
    if isinstance(x, np.ndarray):
        return x
    if x.dtype == mx.bfloat16:
        return np.array(x.view(mx.uint16)).view(grid.numpy_dtype("bfloat16"))
    return np.array(x)


def to_mlx(y: np.ndarray) -> mx.array:
    return mx.array(y.view(np.uint16)).view(mx.bfloat16) if y.dtype.name == "bfloat16" else mx.array(y)
