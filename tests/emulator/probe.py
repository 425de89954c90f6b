"""A small ternary mat-vec of the tests' own, with threadgroup memory: what faults are planted in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bitnet_mlx.backends.kernels.launch import Launch, Value
from bitnet_mlx.backends.kernels.source import KernelSource, Platform
from bitnet_mlx.formats import words2
from tests.emulator.trace import dtype_name


@dataclass(frozen=True)
class Text(KernelSource):
    """A kernel whose texts are given, not read from metal_kernels."""

    header: str = ""

    def header_text(self, platform: Platform) -> str:
        return self.header

    def body_text(self) -> str:
        return self.body


def launch(
    body: str,
    inputs: dict[str, Any],
    outputs: dict[str, tuple[tuple[int, ...], str]],
    *,
    grid: tuple[int, int, int] = (32, 1, 1),
    threadgroup: tuple[int, int, int] = (32, 1, 1),
    header: str = "",
    **template: Value,
) -> Launch:
    """A launch of a text."""
    source = Text("probe", body, (), tuple(inputs), tuple(outputs), header=header)
    return Launch(source, tuple(inputs.values()), tuple(template.items()), grid, threadgroup, tuple(outputs.values()))


MATVEC = """
    uint row = thread_position_in_grid.y;
    uint lane = thread_index_in_simdgroup;
    threadgroup float part[SIMDGROUPS][32], scales[1];
    int K = x_shape[0];
    if (thread_index_in_threadgroup == 0) { scales[0] = s[0]; }
    float sum = 0;
    if (row < uint(y_rows[0])) {
        for (int word = int(lane); word < K / 16; word += 32) {
            uint codes = w[row * (K / 16) + word];
            for (int i = 0; i < 16; i++) {
                sum += float(x[16 * word + i]) * float(int(codes >> (2 * i) & 3u) - 1);
            }
        }
    }
    part[simdgroup_index_in_threadgroup][31 - lane] = sum;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    sum = simd_sum(part[simdgroup_index_in_threadgroup][lane]);
    if (lane == 0 && row < uint(y_rows[0])) {
        y[row] = T(sum * 1.0 * scales[0] + b[row]);
    }
"""


def matvec(n: int, k: int, dtype: str = "float32") -> tuple[Launch, np.ndarray]:
    """(launch, expected): whole numbers, so that every order of summation gives the same."""
    rng = np.random.default_rng((n, k))
    x = rng.integers(-8, 8, k).astype(np.float16)
    t = rng.integers(-1, 2, (n, k)).astype(np.int8)
    b = rng.integers(-9, 9, n).astype(np.float32)
    rows, scale = np.array([n], np.int32), np.array([2.0], np.float32)
    inputs = {"x": x, "w": words2.pack(t), "s": scale, "b": b, "y_rows": rows}
    made = launch(
        MATVEC,
        inputs,
        {"y": ((n,), dtype)},
        grid=(32, -(-n // 4) * 4, 1),
        threadgroup=(32, 4, 1),
        T=dtype,
        SIMDGROUPS=4,
    )
    expected = 2 * (t.astype(np.int64) @ x.astype(np.int64)) + b.astype(np.int64)
    assert dtype_name(x) == "float16"
    return made, expected
