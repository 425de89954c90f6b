"""`bitnet-mlx bench matmul`: the ternary product alone at real shapes, ours against stock MLX on this GPU."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from bitnet_mlx import __version__
from bitnet_mlx.backends import choose
from bitnet_mlx.errors import ConfigError

SHAPES = ((2560, 2560), (3840, 2560), (13824, 2560), (2560, 6912), (20480, 3200))  # 2B-4T's, and one of a 3B model's
_MANY = 64  # from so many rows on, two of the shapes tell enough


def measure(backend: str, rows: tuple[int, ...]) -> dict[str, Any]:
    """The command's record: microseconds a call of each contender, at each shape and number of rows.

    Raises ConfigError where the backend is not one of our kernels' or a number of rows is below 1, BackendError where
    the backend cannot run.
    """
    if min(rows, default=0) < 1:
        raise ConfigError(f"[bench] --rows is {','.join(map(str, rows)) or 'empty'}; numbers from 1 on are allowed")
    choice = choose(backend)
    if choice.name not in ("metal", "cuda"):
        raise ConfigError(
            f"[bench] matmul compares our GPU kernels with stock MLX and the backend is {choice.name} ({choice.reason}); "
            "it needs a Mac with Apple silicon or an NVIDIA GPU; bench decode runs anywhere"
        )
    from bitnet_mlx.backends.mlx_device import chip, measured
    from bitnet_mlx.bench import matmul_mlx
    from bitnet_mlx.bench.turns_mlx import bandwidth, empty_kernel

    chooser = measured("metal" if choice.name == "metal" else "cuda")
    copied = bandwidth()
    points = [(n, k, m) for m in rows for n, k in SHAPES if m < _MANY or (n, k) in SHAPES[2:4]]
    found = list(matmul_mlx.measure(points, chooser, copied))
    return {
        "bench": "matmul", "backend": choice.name, "device": chip(), "copy_gb_s": copied / 1e9,
        "empty_us": empty_kernel(chooser.tuner.runner).median, "calls": matmul_mlx.CALLS, "repeats": matmul_mlx.REPEATS,
        "shapes": [m.record() for m in found], "exact": all(m.exact for m in found if m.kernel != "off"),
        "machine": platform.machine(), "system": platform.platform(), "python": platform.python_version(),
        "mlx": version("mlx"), "version": __version__,
    }  # fmt: skip


def lines(record: dict[str, Any]) -> Iterator[str]:
    """The record for people."""
    yield (
        f"{record['device']}, {record['backend']}: microseconds a call, medians of chained calls in turns; a copy moves "
        f"{record['copy_gb_s']:.0f} GB/s, an empty kernel takes {record['empty_us']:.1f}"
    )
    for shape in record["shapes"]:
        times = ", ".join(f"{name} {time['median']:.1f}" for name, time in shape["times"].items())
        together = ", ".join(f"{name} {time['median']:.1f}" for name, time in shape["together"].items())
        state = "exact" if shape["exact"] else "off" if shape["kernel"] == "off" else "WRONG"
        yield f"  {shape['n']}x{shape['k']} M {shape['m']}: {times}; {state}, {shape['kernel']}"
        yield f"    many at once: {together}; memory alone {shape['floor']:.1f}"
