"""Runs the CUDA text of a launch on the CPU: compiled as C++ with CUDA's names from tests/kernels/host, lane by lane."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np

from bitnet_mlx.backends.kernels.launch import Launch
from tests.kernels.cuda_text import TYPES, has_shape, name, text

HOST = Path(__file__).with_name("host")
_CLANGS = ("clang++-19", "clang++-20", "clang++-21", "clang++")
# Lanes are contexts of ucontext.h with guard pages of 4096 bytes, which a Mac does not have.
CLANG = next(filter(None, map(shutil.which, _CLANGS)), None) if sys.platform == "linux" else None
_MMA = (HOST / "mma.h").read_text(encoding="utf-8")
_EMPTY = ("cooperative_groups.h", "cuda_fp16.h", "cuda_bf16.h")  # their names are in host/cuda.h


def run_on_host(launch: Launch, seeds: tuple[int, ...] = (0, 1)) -> list[np.ndarray]:
    """The launch's outputs; AssertionError where the kernel touches memory that is not its own, waits for ever, leaves
    an output unwritten, or gives different results in the orders of `seeds` (a race)."""
    program = _program(text(launch, instead=(("mma.h", _MMA),)), _call(launch))
    with tempfile.TemporaryDirectory() as folder:
        found = [_run(launch, program, Path(folder), seed) for seed in seeds]
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert a.tobytes() == b.tobytes(), (
                f"{launch.source.name}: results differ from order to order, or are not written"
            )
    return found[0]


def _run(launch: Launch, program: Path, folder: Path, seed: int) -> list[np.ndarray]:
    blocks = [-(-g // t) for g, t in zip(launch.grid, launch.threadgroup, strict=True)]
    threads = [min(g, t) for g, t in zip(launch.grid, launch.threadgroup, strict=True)]  # as MLX cuts it
    numbers = [*blocks, *threads, launch.source.shared_memory, seed, len(launch.inputs), len(launch.outputs)]
    for i, array in enumerate(map(np.ascontiguousarray, launch.inputs)):
        numbers += [array.nbytes, array.ndim, *array.shape]
        (folder / f"in{i}").write_bytes(array.tobytes())
    kinds = [(shape, _dtype(dtype)) for shape, dtype in launch.outputs]
    numbers += [int(np.prod(shape)) * dtype.itemsize for shape, dtype in kinds]
    (folder / "launch").write_text(" ".join(map(str, numbers)), encoding="utf-8")
    ran = subprocess.run([program, folder], capture_output=True, text=True, check=False, timeout=300)
    said = ran.stderr.strip() or {
        -11: "touched memory that is not its own",
        -7: "touched memory that is not its own",
    }.get(ran.returncode, f"exit {ran.returncode}")
    assert ran.returncode == 0, f"{launch.source.name}: {said}"
    return [
        np.frombuffer((folder / f"out{i}").read_bytes(), dtype).reshape(shape) for i, (shape, dtype) in enumerate(kinds)
    ]


def _dtype(dtype: str) -> np.dtype:
    if dtype == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(dtype)


def _call(launch: Launch) -> str:
    source, arguments = launch.source, []
    for i, (argument, array) in enumerate(zip(source.inputs, launch.inputs, strict=True)):
        arguments.append(f"(const {TYPES[np.asarray(array).dtype.name]}*)inputs[{i}]")
        if has_shape(source.body_text(), argument, array):
            arguments.append(f"shapes[{i}]")
    arguments += [f"({TYPES[dtype]}*)outputs[{i}]" for i, (_, dtype) in enumerate(launch.outputs)]
    return (
        f'#include "launch.h"\nvoid host::call_kernel() {{ mlx::core::cu::{name(launch)}({", ".join(arguments)}); }}\n'
    )


@lru_cache(maxsize=1)
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Where programs are built; removed at exit."""
    return tempfile.TemporaryDirectory(prefix="cuda_host_")


@lru_cache(maxsize=1)
def _host() -> Path:
    """The part that every program has, compiled; beside it the headers that a text names."""
    root = Path(_folder().name)
    for path, content in (("mlx/backend/cuda/device/utils.cuh", '#include "cuda.h"\n'), *((e, "") for e in _EMPTY)):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content, encoding="utf-8")
    _compile("-c", "-o", root / "host.o", HOST / "host.cpp")
    return root / "host.o"


@lru_cache(maxsize=256)
def _program(kernel: str, call: str) -> Path:
    """The compiled program for a text."""
    host = _host()
    source = host.with_name(f"{hashlib.sha256((kernel + call).encode()).hexdigest()[:16]}.cpp")
    source.write_text(kernel + call, encoding="utf-8")
    _compile("-o", source.with_suffix(""), source, host)
    return source.with_suffix("")


def _compile(*arguments: str | Path) -> None:
    assert CLANG is not None
    flags = ("-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-w", f"-I{_folder().name}", f"-I{HOST}")
    built = subprocess.run([CLANG, *flags, *arguments], capture_output=True, text=True, check=False)
    assert built.returncode == 0, f"the CUDA text does not compile on the CPU:\n{built.stderr[:4000]}"
