"""One compiled call for all layers and the head: `step(state)`.

A job is a number of items; every thread takes the next items from a shared counter until none is left, so a thread that
is held up (another process on its core) holds up little. There is one parallel region in the text, whatever the job,
and a small job runs on the calling thread alone. A step of one row has five jobs a layer; norms are then serial.
"""

from __future__ import annotations

from typing import Any

from numba import njit, prange, types
from numba.extending import intrinsic

from bitnet_mlx.backends.cpu_jit.attention import attend, gated, rotate
from bitnet_mlx.backends.cpu_jit.emit import Builder, Value, i64
from bitnet_mlx.backends.cpu_jit.floats import OPTIONS, floats, ints, longs, rms_norm
from bitnet_mlx.backends.cpu_jit.layout import (
    ATTEND, ATTENTION, ATTENTION_SCALE, CACHES, CHOSEN, CHOSEN_ROWS, CODES, COS, COUNTER, DOWN, DOWN_NORM, DOWN_PROJ,
    EPS, FFN, FFN_NORM, FIELDS, FINAL_NORM, GATE, GATE_PROJ, GATE_UP, GRAIN, HEAD, HEAD_DIM, HEADS, HIDDEN, INPUT,
    INPUT_NORM, INPUT_STRIDE, ITEMS, JOB, K, K_PROJ, KEYS, KIND, KV_HEADS, LAYER, LAYER_LINEARS, LAYER_NORMS, LAYERS,
    LINEARS, LOGITS, N, NORMS, O_PROJ, OUT, OUT_NORM, PLAIN, POSITIONS, PREPARE, Q, Q_PROJ, QKV, ROTATE, ROW_AT, ROWS, SCALARS,
    SCALES, SCORES_AT, SCRATCH, SCRATCH_BYTES, SEQUENCES, SERIAL, SILU, SIN, SUMS, TERNARY, THREADS, TILE, TOKENS, UP,
    UP_PROJ, V_PROJ, VALUES, WEIGHT, X,
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
def is_ternary(state, which):
    return longs(linear_at(state, which))[KIND] == TERNARY


@njit(**OPTIONS)
def linear_tile(state, which, tile, out, stride, add, worker):
    """One tile of a linear on the prepared input; out is the address of [rows, stride]."""
    entry = linear_at(state, which)
    n0 = tile * TILE
    n1 = min(n0 + TILE, longs(entry)[N])
    plain, plain_stride = state[INPUT], state[INPUT_STRIDE]
    if state[WEIGHT] != 0:
        plain, plain_stride = state[PLAIN], padded(state[K])
    linear_rows(state, entry, plain, plain_stride, n0, n1, out, stride, add, worker)


@njit(**OPTIONS)
def prepare(state, m, wants):
    """Norm (where there is one) and quantise row m of the input. wants: 1 for codes, 2 for floats, 3 for both."""
    k, weight, eps = state[K], state[WEIGHT], floats(state[SCALARS])[EPS]
    x = state[INPUT] + m * state[INPUT_STRIDE] * 4
    blocks = padded(k) // BLOCK
    if wants & 1:
        tokens = state[TOKENS]
        first = m // tokens * tokens
        out = state[CODES] + (first * blocks + m - first) * BLOCK
        sums = state[SUMS] + m * (blocks + 1) * 4
        floats(state[SCALES])[m] = quantize_row(x, weight, k, eps, out, tokens * BLOCK, sums)
        part, total = ints(sums), 0
        for block in range(blocks):
            total += part[block]
        part[blocks] = total
    if wants & 2 and weight != 0:
        rms_norm(x, weight, k, eps, state[PLAIN] + m * padded(k) * 4)


@njit(**OPTIONS)
def wanted(state):
    """What the linears that read the prepared input need (see prepare)."""
    job = state[JOB] >> 8
    wants = 0
    first, last = Q_PROJ, V_PROJ
    if job == OUT_NORM:
        first, last = O_PROJ, O_PROJ
    elif job == FFN_NORM:
        first, last = GATE_PROJ, UP_PROJ
    elif job == DOWN_NORM:
        first, last = DOWN_PROJ, DOWN_PROJ
    for which in range(first, last + 1):
        wants |= 1 if is_ternary(state, which) else 2
    return wants


@njit(**OPTIONS)
def rotate_row(state, m):
    """Queries of row m turned in place; its keys turned and its values copied into the cache."""
    dim = state[HEAD_DIM]
    size, position = dim * 4, longs(state[POSITIONS])[m]
    cos, sin = state[COS] + position * (dim // 2) * 4, state[SIN] + position * (dim // 2) * 4
    for h in range(state[HEADS]):
        q = state[Q] + (m * state[HEADS] + h) * size
        rotate(q, cos, sin, dim // 2, q)
    cache = longs(state[CACHES] + longs(state[SEQUENCES])[m] * (1 + 2 * state[LAYERS]) * 8)
    keys, values = cache[1 + 2 * state[LAYER]], cache[2 + 2 * state[LAYER]]
    for h in range(state[KV_HEADS]):
        there = (h * cache[0] + position) * size
        here = (m * state[KV_HEADS] + h) * size
        rotate(state[KEYS] + here, cos, sin, dim // 2, keys + there)
        source, target = floats(state[VALUES] + here), floats(values + there)
        for d in range(dim):
            target[d] = source[d]


@njit(**OPTIONS)
def attend_item(state, item, worker):
    """One row and one query head; neighbouring items share a head's keys."""
    m, h = item % state[ROWS], item // state[ROWS]
    dim = state[HEAD_DIM]
    cache = longs(state[CACHES] + longs(state[SEQUENCES])[m] * (1 + 2 * state[LAYERS]) * 8)
    head = h // (state[HEADS] // state[KV_HEADS]) * cache[0] * dim * 4
    attend(
        state[Q] + (m * state[HEADS] + h) * dim * 4,
        cache[1 + 2 * state[LAYER]] + head,
        cache[2 + 2 * state[LAYER]] + head,
        longs(state[POSITIONS])[m] + 1,
        dim,
        floats(state[SCALARS])[ATTENTION_SCALE],
        state[SCRATCH] + worker * state[SCRATCH_BYTES] + state[SCORES_AT],
        state[ATTENTION] + (m * padded(state[HEADS] * dim) + h * dim) * 4,
    )


@njit(**OPTIONS)
def qkv_tile(state, tile, worker):
    queries, heads = tiles(state, Q_PROJ), tiles(state, K_PROJ)
    dim = state[HEAD_DIM]
    if tile < queries:
        linear_tile(state, Q_PROJ, tile, state[Q], state[HEADS] * dim, False, worker)
    elif tile < queries + heads:
        linear_tile(state, K_PROJ, tile - queries, state[KEYS], state[KV_HEADS] * dim, False, worker)
    else:
        linear_tile(state, V_PROJ, tile - queries - heads, state[VALUES], state[KV_HEADS] * dim, False, worker)


@njit(**OPTIONS)
def gate_up_tile(state, tile, worker):
    stride = padded(state[FFN])
    linear_tile(state, GATE_PROJ, tile, state[GATE], stride, False, worker)
    linear_tile(state, UP_PROJ, tile, state[UP], stride, False, worker)
    count = min(TILE, state[FFN] - tile * TILE)
    for m in range(state[ROWS]):
        here = (m * stride + tile * TILE) * 4
        gated(state[GATE] + here, state[UP] + here, count, state[SILU])


@njit(**OPTIONS)
def final_norm_row(state, i):
    m = longs(state[CHOSEN])[i]
    width = padded(state[HIDDEN])
    eps = floats(state[SCALARS])[EPS]
    rms_norm(state[X] + m * width * 4, state[WEIGHT], state[HIDDEN], eps, state[PLAIN] + i * width * 4)


@njit(**OPTIONS)
def head_tile(state, tile, worker):
    e = longs(linear_at(state, 0))
    n0 = tile * TILE
    n1 = min(n0 + TILE, e[N])
    room = state[SCRATCH] + worker * state[SCRATCH_BYTES] + state[ROW_AT]
    float_rows(
        e, state[CHOSEN_ROWS], state[PLAIN], padded(state[HIDDEN]), n0, n1, state[LOGITS], e[N], False, room
    )


@njit(**OPTIONS)
def do(state, job, item, wants, worker):
    """One item of a job."""
    hidden = padded(state[HIDDEN])
    if job == PREPARE:
        prepare(state, item, wants)
    elif job == QKV:
        qkv_tile(state, item, worker)
    elif job == ROTATE:
        rotate_row(state, item)
    elif job == ATTEND:
        attend_item(state, item, worker)
    elif job == OUT:
        linear_tile(state, O_PROJ, item, state[X], hidden, True, worker)
    elif job == GATE_UP:
        gate_up_tile(state, item, worker)
    elif job == DOWN:
        linear_tile(state, DOWN_PROJ, item, state[X], hidden, True, worker)
    elif job == FINAL_NORM:
        final_norm_row(state, item)
    else:
        head_tile(state, item, worker)


@njit(**OPTIONS)
def work(state, counter, worker):
    """Take items until none is left."""
    job, items, grain = state[JOB] & 255, state[ITEMS], state[GRAIN]
    wants = wanted(state) if job == PREPARE else 0
    first = take(counter, grain)
    while first < items:
        for item in range(first, min(first + grain, items)):
            do(state, job, item, wants, worker)
        first = take(counter, grain)


@njit(parallel=True, **OPTIONS)
def region(state, counter, workers):
    for worker in prange(workers):
        work(state, counter, worker)


@njit(**OPTIONS)
def run(state, job, items, grain, size):
    """Run a job of `items` items; size: roughly how many weights times rows it multiplies."""
    counter = state.ctypes.data + COUNTER * 8
    state[JOB], state[ITEMS], state[GRAIN], state[COUNTER] = job, items, grain, 0
    workers = min(state[THREADS], (items + grain - 1) // grain)
    if workers <= 1 or size < SERIAL:
        work(state, counter, 0)
    else:
        region(state, counter, workers)


@njit(**OPTIONS)
def take_input(state, norm, source, k, stride):
    """Name the input of the next linears, and norm and quantise its rows."""
    state[INPUT], state[K], state[INPUT_STRIDE] = source, k, stride
    state[WEIGHT] = longs(state[NORMS])[state[LAYER] * LAYER_NORMS + norm]
    run(state, PREPARE | norm << 8, state[ROWS], 1, state[ROWS] * k if state[ROWS] > 1 else 0)


@njit(**OPTIONS)
def layer(state):
    hidden, dim, rows = state[HIDDEN], state[HEAD_DIM], state[ROWS]
    queries, wide = state[HEADS] * dim, padded(hidden)
    take_input(state, INPUT_NORM, state[X], hidden, wide)
    count = tiles(state, Q_PROJ) + tiles(state, K_PROJ) + tiles(state, V_PROJ)
    run(state, QKV, count, 1, count * TILE * hidden * rows)
    run(state, ROTATE, rows, 1, rows * queries if rows > 1 else 0)
    reach = longs(state[POSITIONS])[rows - 1] + 1
    grain = 4 if rows >= 32 else 1
    run(state, ATTEND, rows * state[HEADS], grain, rows * reach * queries * 2)
    take_input(state, OUT_NORM, state[ATTENTION], queries, padded(queries))
    run(state, OUT, tiles(state, O_PROJ), 1, hidden * queries * rows)
    take_input(state, FFN_NORM, state[X], hidden, wide)
    run(state, GATE_UP, tiles(state, UP_PROJ), 1, 2 * hidden * state[FFN] * rows)
    take_input(state, DOWN_NORM, state[GATE], state[FFN], padded(state[FFN]))
    run(state, DOWN, tiles(state, DOWN_PROJ), 1, hidden * state[FFN] * rows)


def step(state):
    """All layers on the rows in X, in place; then the head on the chosen rows (CHOSEN_ROWS may be 0)."""
    for index in range(state[LAYERS]):
        state[LAYER] = index
        layer(state)
    chosen = state[CHOSEN_ROWS]
    if chosen == 0:
        return
    state[LAYER] = state[LAYERS]
    state[WEIGHT] = longs(state[NORMS])[state[LAYERS] * LAYER_NORMS]
    run(state, FINAL_NORM, chosen, 1, chosen * state[HIDDEN] if chosen > 1 else 0)
    count = tiles(state, 0)
    run(state, HEAD, count, 1, count * TILE * state[HIDDEN] * chosen)
