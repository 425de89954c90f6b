"""GPU time of the CUDA kernels alone: a graph of 64 chained launches, replayed, weights rotated past the cache.

    python -m benchmarks.bench_graph build DIR     compile every measurement with nvcc; needs no GPU
    python -m benchmarks.bench_graph run DIR       load and run them on this machine's GPU; prints and records

Through MLX a launch also costs the host some microseconds (bench matmul); this is what is left when nothing does.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from bitnet_mlx.backends.kernels import attention, dp4a, fused, matmul, quantize, rope
from bitnet_mlx.backends.kernels.launch import Launch
from bitnet_mlx.backends.kernels.layout import Layout
from tests.kernels import cuda_text

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "graph.jsonl"
SHAPES = ((2560, 2560), (3840, 2560), (13824, 2560), (2560, 6912), (20480, 3200))
MATRICES = ((2560, 6912, 16), (2560, 6912, 64), (2560, 6912, 512), (2560, 6912, 2048), (13824, 2560, 512))
ROTATED, REPEATS = 150e6, 21
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "int32": 4, "uint32": 4}
BYTES = Layout("bytes")


@dataclass(frozen=True)
class Item:
    """One measurement: a launch, and the input that is another copy in each call ("" for none)."""

    label: str
    launch: Launch
    rotated: str = "w"


def items() -> Iterator[Item]:
    """Everything that a decode step and a prompt run, at 2B-4T's shapes."""
    one = np.zeros(1, np.float32)
    for n, k in SHAPES:
        x, w = np.zeros((1, BYTES.stride(k)), np.uint32), np.broadcast_to(np.uint32(0), (n, k // 16))
        for variant in dp4a.variants(n, k, 1):
            label = f"matvec {n}x{k} {variant}"
            yield Item(label, dp4a.dp4a_matvec(x, w, one, variant=variant, dtype="bfloat16"))
    for n, k in SHAPES:  # with its quantiser in it, as a layer asks for it
        act = "relu2" if k == 6912 else None
        x, w = np.zeros((1, 2 * k if act else k), ml_dtypes.bfloat16), np.broadcast_to(np.uint32(0), (n, k // 16))
        residual = np.zeros((1, n), ml_dtypes.bfloat16) if n <= k else None
        for form in fused.variants(n, k, True):
            launch = fused.fused_matvec(
                x, np.ones(k, np.float32), w, one, None, residual, variant=form, dtype="bfloat16", eps=1e-5, act=act
            )
            yield Item(f"fused {n}x{k} {act or ''} {form}", launch)
    for n, k, m in MATRICES:
        x, w = np.broadcast_to(np.uint32(0), (m, BYTES.stride(k))), np.broadcast_to(np.uint32(0), (n, k // 16))
        for variant in matmul.variants(n, k, m, "cuda")[:3]:
            launch = matmul.matmul(x, w, one, layout=BYTES, variant=variant, dtype="bfloat16")
            yield Item(f"matmul {n}x{k} M {m} {variant}", launch)
    for k, act in ((2560, None), (6912, "relu2")):
        x = np.zeros((1, k if act is None else 2 * k), ml_dtypes.bfloat16)
        norm = np.ones(k, np.float32)
        launch = quantize.quantize(x, layout=BYTES, dtype="bfloat16", norm=norm, eps=1e-5, act=act)
        yield Item(f"quantize {k} norm {act or ''}".strip(), launch, "")
    qkv, angle = np.zeros((1, 1, 3840), ml_dtypes.bfloat16), np.zeros((1, 1, 64), np.float32)
    for room in (256, 512, 1024, 2048, 4096):
        yield from attentions(room)
    yield Item("rope", rope.rope_kv(qkv, angle, angle, heads=20, kv_heads=5, dtype="bfloat16"), "")


def attentions(room: int) -> Iterator[Item]:
    """The launches of one token's attention behind `room` positions."""
    qkv, angle = np.zeros((1, 1, 3840), ml_dtypes.bfloat16), np.zeros((1, 1, 64), np.float32)
    past, recent = (np.zeros((2, 1, 5, n, 128), ml_dtypes.bfloat16) for n in (room, 64))
    cut = attention.plan(1, 20, 5, 128, room, 64, "bfloat16")
    lengths = np.array([room, 32], np.int32)
    launch = attention.decode_attention(qkv, angle, angle, past, recent, lengths, heads=20, dtype="bfloat16", cut=cut)
    yield Item(f"attention {room} {cut}", launch, "past")
    if cut.shares > 1:
        shares = np.zeros(launch.outputs[0][0], np.float32)
        yield Item(f"attention {room} merge", attention.merge(shares, "bfloat16"), "")


def program(item: Item) -> str:
    """The kernel's text, and a function that times it."""
    launch, source = item.launch, item.launch.source
    body = source.body_text()
    lines, arguments = [], []
    for name, a in zip(source.inputs, launch.inputs, strict=True):
        size = math.prod(a.shape) * SIZES[a.dtype.name]
        copies = min(64, max(2, int(ROTATED / size))) if name == item.rotated else 1
        made = f"pool.array({size}ull, {copies}, {str(name == item.rotated).lower()})"
        if a.dtype == np.int32:  # numbers that a kernel counts by
            made = f"pool.numbers({{{', '.join(map(str, a))}}})"
        lines.append(f"char* {name} = {made};")
        kind = cuda_text.TYPES[a.dtype.name]
        arguments.append(f"(const {kind}*)({name} + call % {copies} * {size}ull)")
        if cuda_text.has_shape(body, name, a):
            values = " ".join(f"{name}_shape.sizes[{i}] = {d};" for i, d in enumerate(a.shape))
            lines.append(f"mlx::core::cu::Shape {name}_shape; {values}")
            arguments.append(f"{name}_shape")
    for name, (shape, dtype) in zip(source.outputs, launch.outputs, strict=True):
        lines.append(f"char* {name} = pool.array({math.prod(shape) * SIZES[dtype]}ull, 1, false);")
        arguments.append(f"({cuda_text.TYPES[dtype]}*){name}")
    blocks = ", ".join(str(-(-g // t)) for g, t in zip(launch.grid, launch.threadgroup, strict=True))
    threads = ", ".join(map(str, launch.threadgroup))
    kernel = f"mlx::core::cu::{cuda_text.name(launch)}"
    undone = "".join(f"#undef {word}\n" for word in ("device", "constant", "thread", "threadgroup"))
    return f"""{cuda_text.text(launch)}{undone}#include "graph_time.h"
extern "C" int measure(float* microseconds, int repeats) {{
  Pool pool;
  {chr(10).join(lines)}
  cudaFuncSetAttribute({kernel}, cudaFuncAttributeMaxDynamicSharedMemorySize, {source.shared_memory});
  return time_graph(microseconds, repeats, [&](int call, cudaStream_t stream) {{
    {kernel}<<<dim3({blocks}), dim3({threads}), {source.shared_memory}, stream>>>({", ".join(arguments)});
  }});
}}
"""


def build(folder: Path) -> None:
    """One shared library a measurement, and their list."""
    if cuda_text.NVCC is None:
        sys.exit("[bench_graph] nvcc is not found; install the CUDA toolkit")
    folder.mkdir(parents=True, exist_ok=True)
    found = list(items())

    def compile_one(i: int) -> None:
        text, library = folder / f"{i}.cu", folder / f"{i}.so"
        text.write_text(program(found[i]), encoding="utf-8")
        include = [f"-I{HERE}", f"-I{cuda_text.STUBS}"]
        options = ["-O3", "-std=c++17", f"-arch={cuda_text.ARCHITECTURE}", "-w", "-shared", "-Xcompiler", "-fPIC"]
        subprocess.run([cuda_text.NVCC or "", *options, *include, "-o", library, text], check=True)

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        list(pool.map(compile_one, range(len(found))))
    (folder / "labels.json").write_text(json.dumps([item.label for item in found]), encoding="utf-8")


def run(folder: Path) -> dict[str, Any]:
    """Median and quartiles of microseconds a launch, of each."""
    figures = {}
    for i, label in enumerate(json.loads((folder / "labels.json").read_text(encoding="utf-8"))):
        times = (ctypes.c_float * REPEATS)()
        error = ctypes.CDLL(str(folder / f"{i}.so")).measure(times, REPEATS)
        if error:
            sys.exit(f"[bench_graph] {label}: CUDA says error {error}")
        low, median, high = statistics.quantiles(times, n=4)
        figures[label] = {"median": round(median, 3), "low": round(low, 3), "high": round(high, 3)}
        print(f"{median:8.2f} us  {label}")
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    gpu = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "command": "python -m benchmarks.bench_graph", "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit, "gpu": gpu, "system": platform.platform(), "calls": 64, "repeats": REPEATS,
        "microseconds": figures,
    }  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("build", "run"):
        sys.exit(__doc__)
    if sys.argv[1] == "build":
        build(Path(sys.argv[2]))
    else:
        with RESULTS.open("a", encoding="utf-8") as results:
            results.write(json.dumps(run(Path(sys.argv[2]))) + "\n")
