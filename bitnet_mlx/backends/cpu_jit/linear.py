"""Rows n0 .. n1 of a linear for all rows of activations: ternary on int8 codes, or float in the reference's order.

`e` is the linear's fields (see layout.py); results go to, or are added to, float32 out[m, n].
"""

from __future__ import annotations

import numpy as np
from numba import njit

from bitnet_mlx.backends.cpu_jit import layout as at
from bitnet_mlx.backends.cpu_jit.floats import (
    OPTIONS,
    ZERO,
    apart,
    dot,
    dot_bfloat16,
    dot_grouped,
    dot_ternary,
    floats,
    ints,
)  # fmt: skip
from bitnet_mlx.backends.cpu_jit.panels import FROM, GROUP, panel_sums, panel_value
from bitnet_mlx.backends.cpu_jit.product import (
    BLOCK,
    BLOCK_BYTES,
    PANEL,
    panel_product,
    product_of_2,
    product_of_4,
    row_product,
)


@njit(**OPTIONS)
def put(out, value, bias, n, add):
    """out[0] = value + bias[n], or out[0] += that."""
    y = floats(out)
    if bias != 0:
        value += floats(bias)[n]
    if add:
        y[0] += value
    else:
        y[0] = value


@njit(**OPTIONS)
def one_scale_rows(state, e, blocks, n0, n1, out, stride, add):
    """Activations one at a time, one scale a weight row."""
    apart()
    scales, scale, step = floats(state[at.SCALES]), floats(e[at.SCALE]), e[at.SCALE_STEP]
    sums = ints(state[at.SUMS])
    for n in range(n0, n1):
        w = e[at.DATA] + n * e[at.ROW_BYTES]
        for m in range(state[at.ROWS]):
            acc = row_product(w, state[at.CODES] + m * blocks * BLOCK, blocks) - sums[m * (blocks + 1) + blocks]
            put(out + (m * stride + n) * 4, (np.float32(acc) / scales[m]) * scale[n * step], e[at.BIAS], n, add)


@njit(**OPTIONS)
def group_scale_rows(state, e, blocks, n0, n1, out, stride, add):
    """Activations one at a time, a scale for each block of 128, the blocks added in ascending order."""
    apart()
    scales, scale, step = floats(state[at.SCALES]), floats(e[at.SCALE]), e[at.SCALE_STEP]
    sums = ints(state[at.SUMS])
    for n in range(n0, n1):
        w = e[at.DATA] + n * e[at.ROW_BYTES]
        for m in range(state[at.ROWS]):
            x = state[at.CODES] + m * blocks * BLOCK
            total = ZERO
            for g in range(blocks):
                acc = row_product(w + g * BLOCK_BYTES, x + g * BLOCK, 1) - sums[m * (blocks + 1) + g]
                total += (np.float32(acc) / scales[m]) * scale[n * step + g]
            put(out + (m * stride + n) * 4, total, e[at.BIAS], n, add)


@njit(**OPTIONS)
def tokens_product(w, x, blocks, out, tokens):
    """out[8] += one weight row with the first `tokens` of a panel, or with some more of it."""
    if tokens > 4:
        panel_product(w, x, blocks, out)
    elif tokens > 2:
        product_of_4(w, x, blocks, out)
    else:
        product_of_2(w, x, blocks, out)


@njit(**OPTIONS)
def one_scale_panels(state, e, blocks, n0, n1, out, stride, add, tile):
    """Panels of 8 tokens, one scale a weight row. tile: int32 [n1 - n0, 8]."""
    apart()
    scales, scale, step = floats(state[at.SCALES]), floats(e[at.SCALE]), e[at.SCALE_STEP]
    sums, acc = ints(state[at.SUMS]), ints(tile)
    for m0 in range(0, state[at.ROWS], PANEL):
        x, tokens = state[at.CODES] + m0 * blocks * BLOCK, min(PANEL, state[at.ROWS] - m0)
        for i in range((n1 - n0) * PANEL):
            acc[i] = 0
        deep = at.K_TILE if tokens > 4 else 2 * at.K_TILE if tokens > 2 else blocks
        for k in range(0, blocks, deep):
            w = e[at.DATA] + n0 * e[at.ROW_BYTES] + k * BLOCK_BYTES
            count = min(deep, blocks - k)
            for r in range(n1 - n0):
                tokens_product(w + r * e[at.ROW_BYTES], x + k * BLOCK * PANEL, count, tile + r * PANEL * 4, tokens)
        for t in range(tokens):
            m = m0 + t
            s, total = scales[m], sums[m * (blocks + 1) + blocks]
            for r in range(n1 - n0):
                n = n0 + r
                value = (np.float32(acc[r * PANEL + t] - total) / s) * scale[n * step]
                put(out + (m * stride + n) * 4, value, e[at.BIAS], n, add)


@njit(**OPTIONS)
def group_scale_panels(state, e, blocks, n0, n1, out, stride, add, tile):
    """Panels of 8 tokens, a scale for each block. tile: int32 [8], then float32 [8]."""
    apart()
    scales, scale, step = floats(state[at.SCALES]), floats(e[at.SCALE]), e[at.SCALE_STEP]
    sums, acc, total = ints(state[at.SUMS]), ints(tile), floats(tile + PANEL * 4)
    for m0 in range(0, state[at.ROWS], PANEL):
        count = min(PANEL, state[at.ROWS] - m0)
        x = state[at.CODES] + m0 * blocks * BLOCK
        for n in range(n0, n1):
            w = e[at.DATA] + n * e[at.ROW_BYTES]
            for t in range(PANEL):
                total[t] = ZERO
            for g in range(blocks):
                for t in range(PANEL):
                    acc[t] = 0
                tokens_product(w + g * BLOCK_BYTES, x + g * BLOCK * PANEL, 1, tile, count)
                for t in range(count):
                    part = acc[t] - sums[(m0 + t) * (blocks + 1) + g]
                    total[t] += (np.float32(part) / scales[m0 + t]) * scale[n * step + g]
            for t in range(count):
                put(out + ((m0 + t) * stride + n) * 4, total[t], e[at.BIAS], n, add)


@njit(**OPTIONS)
def float_panels(e, rows, x, x_stride, n0, n1, out, stride, add, sums):
    """float_rows for several rows of x, whose weights are read once for 8 of them."""
    apart()
    for m0 in range(0, rows, PANEL):
        count = min(PANEL, rows - m0)
        for first in range(n0, n1, at.HEAD_ROWS):
            end = min(first + at.HEAD_ROWS, n1)
            panel_sums(e, first, end, x + m0 * x_stride * 4, x_stride * 4, count, sums)
            for n in range(first, end):
                for t in range(count):
                    value = panel_value(sums, n - first, t)
                    put(out + ((m0 + t) * stride + n) * 4, value, e[at.BIAS], n, add)


@njit(**OPTIONS)
def float_rows(e, rows, x, x_stride, n0, n1, out, stride, add, sums):
    """Rows of floats, or of codes with scales, times float32 x [rows, x_stride] at an address. sums: see panels.py.

    Behind x there is room for a whole panel of rows, whatever it holds.
    """
    apart()
    if rows >= FROM and (e[at.KIND] == at.GROUPED or e[at.KIND] == at.BFLOAT16) and e[at.WIDTH] % GROUP == 0:
        float_panels(e, rows, x, x_stride, n0, n1, out, stride, add, sums)
        return
    kind, k, width, row_bytes, step = e[at.KIND], e[at.WIDTH], x_stride * 4, e[at.ROW_BYTES], e[at.SCALE_STEP] * 4
    for n in range(n0, n1):
        w, scale = e[at.DATA] + n * row_bytes, e[at.SCALE] + n * step
        for m in range(rows):
            if kind == at.BFLOAT16:
                value = dot_bfloat16(w, x + m * width, k)
            elif kind == at.GROUPED:
                value = dot_grouped(w, scale, x + m * width, k)
            elif kind == at.FLOAT32:
                value = dot(w, x + m * width, k)
            else:
                value = dot_ternary(w, scale, e[at.SCALE_GROUPS], x + m * width, k)
            put(out + (m * stride + n) * 4, value, e[at.BIAS], n, add)


@njit(**OPTIONS)
def linear_rows(state, e, x, x_stride, n0, n1, out, stride, add, worker):
    """out[m, n0:n1] of every row m for one linear. x, x_stride: the float inputs, for a linear that is not ternary."""
    scratch = state[at.SCRATCH] + worker * state[at.SCRATCH_BYTES]
    if e[at.KIND] != at.TERNARY:
        float_rows(e, state[at.ROWS], x, x_stride, n0, n1, out, stride, add, scratch + state[at.LANES_AT])
        return
    blocks = (e[at.WIDTH] + BLOCK - 1) // BLOCK
    tile = scratch + state[at.TILE_AT]
    if e[at.SCALE_GROUPS] == 1:
        if state[at.TOKENS] == 1:
            one_scale_rows(state, e, blocks, n0, n1, out, stride, add)
        else:
            one_scale_panels(state, e, blocks, n0, n1, out, stride, add, tile)
    elif state[at.TOKENS] == 1:
        group_scale_rows(state, e, blocks, n0, n1, out, stride, add)
    else:
        group_scale_panels(state, e, blocks, n0, n1, out, stride, add, tile)
