"""What a thread does: takes items of the current job until none is left. Compiled as one C function, `work`.

An item is a row to norm and quantise, a tile of a linear, a row to rotate, or a head to attend; see layout.py.
"""

from __future__ import annotations

from typing import Any

from numba import njit, types
from numba.extending import intrinsic

from bitnet_mlx.backends.cpu_jit.attention import attend, gated, rotate
from bitnet_mlx.backends.cpu_jit.emit import Builder, Value, i64
from bitnet_mlx.backends.cpu_jit.floats import OPTIONS, floats, ints, longs, rms_norm
from bitnet_mlx.backends.cpu_jit.layout import (
    ATTEND, ATTENTION, ATTENTION_SCALE, CACHES, CHOSEN, CHOSEN_ROWS, CODES, COS, COUNTER, DOWN, DOWN_PROJ, EPS, FFN,
    FIELDS, FINAL_NORM, GATE, GATE_PROJ, GATE_UP, GRAIN, HEAD, HEAD_DIM, HEADS, HIDDEN, INPUT, INPUT_STRIDE, ITEMS, JOB,
    K, K_PROJ, KEYS, KIND, KV_HEADS, LAYER, LAYER_LINEARS, LAYERS, LINEARS, LOGITS, N, O_PROJ, OUT, PLAIN, POSITIONS,
    PREPARE, Q, Q_PROJ, ROTATE, ROW_AT, ROWS, SCALARS, SCALES, SCORES_AT, SCRATCH, SCRATCH_BYTES, SEQUENCES, SILU,
    SIN, SUMS, TEAM, TILE, TOKENS, UP, V_PROJ, VALUES, WANTS, WEIGHT, X,
)  # fmt: skip
from bitnet_mlx.backends.cpu_jit.linear import float_rows, linear_rows
from bitnet_mlx.backends.cpu_jit.product import BLOCK
from bitnet_mlx.backends.cpu_jit.quantize import quantize_row


@intrinsic
def take(typing: Any, counter: Any, count: Any) -> Any:
    """The old value of the int64 at an address, which grows by `count`; atomic."""

    def build(context: Any, b: Builder, signature: Any, args: Any) -> Value:
        return b.atomic_rmw("add", b.inttoptr(args[0], i64.as_pointer()), args[1], "monotonic")

    return types.int64(types.int64, types.int64), build


@njit(**OPTIONS)
def padded(width):
    return (width + BLOCK - 1) // BLOCK * BLOCK


@njit(**OPTIONS)
def linear_at(state, which):
    """Address of a linear's fields: of this layer, or the head's for layer = LAYERS, which = 0."""
    return state[LINEARS] + (state[LAYER] * LAYER_LINEARS + which) * FIELDS * 8


@njit(**OPTIONS)
def tiles(state, which):
    return (longs(linear_at(state, which))[N] + TILE - 1) // TILE


@njit(**OPTIONS)
def prepare(state, m):
    """Norm (where there is one) and quantise row m of the input. WANTS: 1 for codes, 2 for floats, 3 for both."""
    k, weight, eps = state[K], state[WEIGHT], floats(state[SCALARS])[EPS]
    x = state[INPUT] + m * state[INPUT_STRIDE] * 4
    blocks = padded(k) // BLOCK
    if state[WANTS] & 1:
        tokens = state[TOKENS]
        first = m // tokens * tokens
        out = state[CODES] + (first * blocks + m - first) * BLOCK
        sums = state[SUMS] + m * (blocks + 1) * 4
        floats(state[SCALES])[m] = quantize_row(x, weight, k, eps, out, tokens * BLOCK, sums)
        part, total = ints(sums), 0
        for block in range(blocks):
            total += part[block]
        part[blocks] = total
    if state[WANTS] & 2 and weight != 0:
        rms_norm(x, weight, k, eps, state[PLAIN] + m * padded(k) * 4)


@njit(**OPTIONS)
def cache_of(state, m):
    """The cache of row m: capacity, then keys and values of each layer."""
    return longs(state[CACHES] + longs(state[SEQUENCES])[m] * (1 + 2 * state[LAYERS]) * 8)


@njit(**OPTIONS)
def rotate_row(state, m):
    """Queries of row m turned in place; its keys turned and its values copied into the cache."""
    dim = state[HEAD_DIM]
    size, position = dim * 4, longs(state[POSITIONS])[m]
    cos, sin = state[COS] + position * (dim // 2) * 4, state[SIN] + position * (dim // 2) * 4
    cache, heads = cache_of(state, m), state[HEADS]
    keys, values = cache[1 + 2 * state[LAYER]], cache[2 + 2 * state[LAYER]]
    for i in range(heads + state[KV_HEADS]):
        here = state[Q] + (m * heads + i) * size
        there = here
        if i >= heads:
            here = state[KEYS] + (m * state[KV_HEADS] + i - heads) * size
            there = keys + ((i - heads) * cache[0] + position) * size
        rotate(here, cos, sin, dim // 2, there)
    for h in range(state[KV_HEADS]):
        source = floats(state[VALUES] + (m * state[KV_HEADS] + h) * size)
        target = floats(values + (h * cache[0] + position) * size)
        for d in range(dim):
            target[d] = source[d]


@njit(**OPTIONS)
def attend_item(state, item, worker):
    """One row and a team of query heads that share keys; neighbouring items share them too."""
    m, team, dim = item % state[ROWS], state[TEAM], state[HEAD_DIM]
    h = item // state[ROWS] * team
    cache = cache_of(state, m)
    head = h // (state[HEADS] // state[KV_HEADS]) * cache[0] * dim * 4
    attend(
        state[Q] + (m * state[HEADS] + h) * dim * 4,
        team,
        cache[1 + 2 * state[LAYER]] + head,
        cache[2 + 2 * state[LAYER]] + head,
        longs(state[POSITIONS])[m] + 1,
        dim,
        floats(state[SCALARS])[ATTENTION_SCALE],
        state[SCRATCH] + worker * state[SCRATCH_BYTES] + state[SCORES_AT],
        state[ATTENTION] + (m * padded(state[HEADS] * dim) + h * dim) * 4,
    )


@njit(**OPTIONS)
def place(state, job, item):
    """(linear, its tile, out, floats between rows of out) of an item of QKV, OUT, GATE_UP or DOWN."""
    if job == OUT or job == DOWN:
        return (O_PROJ if job == OUT else DOWN_PROJ), item, state[X], padded(state[HIDDEN])
    if job == GATE_UP:
        return GATE_PROJ, item, state[GATE], padded(state[FFN])
    queries, keys = tiles(state, Q_PROJ), tiles(state, K_PROJ)
    dim = state[HEAD_DIM]
    if item < queries:
        return Q_PROJ, item, state[Q], state[HEADS] * dim
    if item < queries + keys:
        return K_PROJ, item - queries, state[KEYS], state[KV_HEADS] * dim
    return V_PROJ, item - queries - keys, state[VALUES], state[KV_HEADS] * dim


@njit(**OPTIONS)
def linear_item(state, job, item, worker):
    """A tile of a linear on the prepared input; for GATE_UP the same tile of both, then the gate."""
    which, tile, out, stride = place(state, job, item)
    plain, plain_stride = state[INPUT], state[INPUT_STRIDE]
    if state[WEIGHT] != 0:
        plain, plain_stride = state[PLAIN], padded(state[K])
    n0 = tile * TILE
    n1 = min(n0 + TILE, longs(linear_at(state, which))[N])
    for i in range(2 if job == GATE_UP else 1):
        to = state[UP] if i == 1 else out
        add = job == OUT or job == DOWN
        linear_rows(state, linear_at(state, which + i), plain, plain_stride, n0, n1, to, stride, add, worker)
    if job == GATE_UP:
        for m in range(state[ROWS]):
            here = (m * stride + n0) * 4
            gated(out + here, state[UP] + here, n1 - n0, state[SILU])


@njit(**OPTIONS)
def final_norm_row(state, i):
    width, eps = padded(state[HIDDEN]), floats(state[SCALARS])[EPS]
    x = state[X] + longs(state[CHOSEN])[i] * width * 4
    rms_norm(x, state[WEIGHT], state[HIDDEN], eps, state[PLAIN] + i * width * 4)


@njit(**OPTIONS)
def head_tile(state, tile, worker):
    e = longs(linear_at(state, 0))
    n0 = tile * TILE
    n1 = min(n0 + TILE, e[N])
    room = state[SCRATCH] + worker * state[SCRATCH_BYTES] + state[ROW_AT]
    x, stride = state[PLAIN], padded(state[HIDDEN])
    float_rows(e, state[CHOSEN_ROWS], x, stride, n0, n1, state[LOGITS], e[N], False, room)


def work(address, worker):
    """Take items of the state's job until none is left. worker: which thread's scratch memory to use."""
    state = longs(address)
    counter = address + COUNTER * 8
    job, items, grain = state[JOB], state[ITEMS], state[GRAIN]
    first = take(counter, grain)
    while first < items:
        for item in range(first, min(first + grain, items)):
            if job == PREPARE:
                prepare(state, item)
            elif job == ROTATE:
                rotate_row(state, item)
            elif job == ATTEND:
                attend_item(state, item, worker)
            elif job == FINAL_NORM:
                final_norm_row(state, item)
            elif job == HEAD:
                head_tile(state, item, worker)
            else:
                linear_item(state, job, item, worker)
        first = take(counter, grain)
