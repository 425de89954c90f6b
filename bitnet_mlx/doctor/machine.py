"""The machine: chip, system, memory, packages and where MLX came from."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time

import numpy as np

from bitnet_mlx.backends import missing
from bitnet_mlx.bench.stamp import installed
from bitnet_mlx.doctor.report import Machine
from bitnet_mlx.memory.system import processor

PACKAGES = ("mlx", "mlx-lm", "numba", "tbb", "numpy", "tokenizers", "sentencepiece", "huggingface-hub")
_COPIED = 128 << 20  # bytes; larger than caches


def machine(gpu: str | None) -> Machine:
    """gpu: "metal" or "cuda" where one of them runs, else None."""
    cores = _apple_cores() if gpu == "metal" else None
    found = Machine(platform.platform(), platform.machine(), _chip(), cores, _memory(), mlx_from=_mlx_from())
    if gpu is None:
        found.bandwidth = _copy_cpu()
        return found
    from bitnet_mlx.backends.kernels import chips
    from bitnet_mlx.backends.mlx_device import copy_bandwidth, keeps_float32

    found.bandwidth, found.keeps_float32 = copy_bandwidth(), keeps_float32()
    found.emulates_bfloat16 = gpu == "metal" and emulates_bfloat16(found.chip)
    listed = chips.find(found.chip, cores)
    found.nominal_bandwidth = listed.bandwidth if listed else None
    return found


def emulates_bfloat16(chip: str) -> bool:
    """Whether an Apple chip's GPU computes bfloat16 in other types: the first two generations do."""
    return re.match(r"Apple M[12]\b", chip) is not None


def packages() -> dict[str, str | None]:
    """Versions; None for what is not installed."""
    return {name: installed(name) for name in PACKAGES}


def _mlx_from() -> str | None:
    """Whether MLX is a wheel from an index, or was built from sources, where kernels meet another compiler."""
    try:
        mlx = importlib.metadata.distribution("mlx")
    except importlib.metadata.PackageNotFoundError:
        return None
    origin = mlx.read_text("direct_url.json")
    if origin:
        return f"not from an index: {json.loads(origin).get('url', 'unknown origin')}"
    return "a wheel" if mlx.read_text("WHEEL") else "not a wheel"


def _chip() -> str:
    if not missing("mlx"):
        from bitnet_mlx.backends.mlx_device import chip

        return chip()
    return processor()


def _memory() -> int | None:
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _apple_cores() -> int | None:
    """Of the GPU, which a chip's name does not tell; None where the system does not say."""
    if sys.platform != "darwin":
        return None
    try:
        done = subprocess.run(
            ["/usr/sbin/ioreg", "-r", "-c", "AGXAccelerator", "-d", "1"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r'"gpu-core-count"\s*=\s*(\d+)', done.stdout)
    return int(found.group(1)) if found else None


def _copy_cpu() -> float:
    """GB/s that are read and written by a copy in one thread, the best of a few."""
    source = np.ones(_COPIED // 4, np.float32)
    target = np.empty_like(source)
    best = 0.0
    for _ in range(4):
        started = time.perf_counter()
        np.copyto(target, source)
        best = max(best, 2 * source.nbytes / (time.perf_counter() - started) / 1e9)
    return best
