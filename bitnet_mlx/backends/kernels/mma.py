"""The ternary matrix product for CUDA, in the int8 tensor cores: for prefill and batches."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from bitnet_mlx.backends.kernels.launch import Launch
from bitnet_mlx.backends.kernels.source import KernelSource

_LANES = 32
_PROCESSORS = 132  # of an H100; only the order of the forms to try depends on it
_SHARED = 227 * 1024  # bytes of shared memory that the blocks of a processor can have
_REGISTERS = 65_536


@dataclass(frozen=True)
class MmaVariant:
    """down, across, along: warps of a block along M, N and K. rows, columns: a warp's tiles, 8 along M by 16 along N.

    chunks: 64 codes each, of a stage along K, a multiple of `along`. stages: of the pipeline, in shared memory.
    """

    down: int = 2
    across: int = 2
    along: int = 1
    rows: int = 8
    columns: int = 4
    chunks: int = 2
    stages: int = 4

    @property
    def tile(self) -> tuple[int, int]:
        """Outputs of a block: rows of activations, rows of the weight."""
        return self.down * self.rows * 8, self.across * self.columns * 16

    @property
    def warps(self) -> int:
        """Of a block."""
        return self.down * self.across * self.along

    @property
    def shared_memory(self) -> int:
        """Bytes: the stages, or what the warps along K hand over at the end."""
        m, n = self.tile
        stage = self.chunks * (m * 4 + 4 + n + 4) * 16
        return max(self.stages * stage, m * n * 4 if self.along > 1 else 0)

    @property
    def blocks_at_once(self) -> int:
        """Blocks that a processor holds, by shared memory and (estimated) registers; 0 if none."""
        registers = 4 * self.rows * self.columns + 8 * self.columns + 50
        if registers > 255:
            return 0
        return min(_SHARED // (self.shared_memory + 1024), _REGISTERS // (registers * _LANES * self.warps))

    def grouped(self) -> MmaVariant:
        """The form for scales in groups: a group a stage, half the columns, since each has a float32 sum as well."""
        return replace(
            self, along=1, chunks=2, across=2 * self.across, rows=min(self.rows, 4), columns=min(self.columns, 2)
        )


_SHAPES = (  # warps along M, N, K; tiles of a warp along M, N; chunks
    (2, 2, 1, 8, 4, 2),  # 128 x 128
    (2, 4, 1, 8, 4, 2),  # 128 x 256
    (2, 2, 1, 8, 5, 2),  # 128 x 160
    (2, 4, 1, 8, 5, 2),  # 128 x 320
    (1, 4, 1, 8, 4, 2),  # 64 x 256
    (1, 4, 1, 8, 5, 2),  # 64 x 320
    (1, 2, 4, 8, 5, 4),  # 64 x 160
    (2, 2, 1, 4, 5, 2),
    (1, 4, 1, 8, 2, 2),  # 64 x 128
    (1, 2, 4, 8, 4, 4),
    (1, 2, 4, 4, 4, 4),  # 32 x 128
    (1, 2, 2, 8, 2, 4),  # 64 x 64
    (1, 2, 4, 4, 2, 4),  # 32 x 64
    (1, 1, 4, 4, 2, 4),  # 32 x 32
    (1, 1, 8, 4, 2, 8),
    (1, 1, 4, 2, 2, 4),  # 16 x 32
    (1, 1, 8, 2, 2, 8),
    (1, 1, 8, 2, 1, 8),  # 16 x 16
)


@lru_cache(maxsize=256)
def variants(n: int, k: int, m: int) -> list[MmaVariant]:
    """The forms worth trying for M rows times a weight [N, K], the likely best first. Every one is exact."""
    forms = [MmaVariant(*shape, stages) for shape in _SHAPES for stages in (4, 3)]
    useful = [form for form in forms if form.blocks_at_once and form.tile[0] < m + 64 and form.chunks * 64 < k + 128]
    return sorted(useful, key=lambda form: (-form.stages, _clocks(form, n, k, m)))


def _clocks(form: MmaVariant, n: int, k: int, m: int) -> float:
    """A guess at the busiest processor's clock cycles, from an H100's published and reported rates."""
    tile_m, tile_n = form.tile
    blocks = math.ceil(math.ceil(m / tile_m) * math.ceil(n / tile_n) / _PROCESSORS)
    warps = min(blocks, form.blocks_at_once) * form.warps
    busy = min(0.95, 0.75 + (warps - 4) / 20) if warps >= 4 else warps / 5  # few warps do not hide each other's waits
    # For 64 codes along K: products, 16 x 8 x 32 in 6.2 cycles on each of four units; shared memory, 128 bytes a cycle;
    # the second-level cache, about 24 bytes a cycle for each processor.
    products = tile_m / 8 * tile_n / 16 * 2 * 6.2 / 4
    brought = tile_m * 64 + tile_n * 16
    shared = form.down * form.across * (form.rows * 4 + form.columns * 2) + brought / 128
    chunk = max(products / busy, shared, brought / 24)
    # Found by measuring: large tiles that are split along K, and blocks of eight warps, do worse than all that.
    chunk *= 1.4 if form.along > 1 and form.rows * form.columns >= 16 else 1.15 if form.warps > 4 else 1.0
    return blocks * (chunk * math.ceil(k / 64) + 2000 / min(blocks, form.blocks_at_once) + 500 * form.along)


@lru_cache(maxsize=64)
def _source(shared_memory: int) -> KernelSource:
    return KernelSource(
        name="ternary_matmul_mma",
        body="matmul_mma.cu",
        headers=("epilogue.h", "mma.h"),
        inputs=("x", "w", "scale", "bias", "residual"),
        outputs=("y",),
        platforms=("cuda",),
        shared_memory=shared_memory,
    )


def mma_matmul(x: Any, w: Any, scale: Any, bias: Any, residual: Any, *, variant: MmaVariant, dtype: str) -> Launch:
    """What `matmul.matmul` says, for layout "bytes"."""
    m, n = x.shape[0], w.shape[0]
    kind = 2 if len(scale.shape) == 2 else int(len(scale.shape) == 1 and scale.shape[0] != 1)
    if kind == 2:
        variant = variant.grouped()
    tile_m, tile_n = variant.tile
    return Launch(
        *_source(variant.shared_memory).given(x, w, scale, bias, residual),
        (
            ("T", dtype),
            ("WM", variant.down),
            ("WN", variant.across),
            ("WK", variant.along),
            ("MT", variant.rows),
            ("NT", variant.columns),
            ("CHUNKS", variant.chunks),
            ("STAGES", variant.stages),
            ("SCALES", kind),
            ("BIAS", bias is not None),
            ("RESIDUAL", residual is not None),
        ),
        (_LANES * math.ceil(m / tile_m), variant.warps * math.ceil(n / tile_n), 1),
        (_LANES, variant.warps, 1),
        (((m, n), dtype),),
    )
