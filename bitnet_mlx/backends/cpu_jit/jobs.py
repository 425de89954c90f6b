"""What a thread does: takes items of the current job until none is left. Compiled as one C function, `work`.

An item is a row to norm and quantise, a tile of a linear, a row to rotate, or a head to attend; see layout.py.
"""

from __future__ import annotations

from typing import Any

from numba import njit, types
from numba.extending import intrinsic

from bitnet_mlx.backends.cpu_jit import layout as at
from bitnet_mlx.backends.cpu_jit.adapter import adapted, low_row
from bitnet_mlx.backends.cpu_jit.attention import attend, gated, rotate
from bitnet_mlx.backends.cpu_jit.emit import Builder, Value, i64
from bitnet_mlx.backends.cpu_jit.floats import OPTIONS, floats, ints, longs, norm_row, rms_norm
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
    """A width in whole blocks."""
    return (width + BLOCK - 1) // BLOCK * BLOCK


@njit(**OPTIONS)
def linear_at(state, which):
    """Address of a linear's fields: of this layer, or the head's for layer = LAYERS, which = 0."""
    return state[at.LINEARS] + (state[at.LAYER] * at.LAYER_LINEARS + which) * at.FIELDS * 8


@njit(**OPTIONS)
def tiles(state, which):
    """How many tiles a linear has."""
    return (longs(linear_at(state, which))[at.N] + at.TILE - 1) // at.TILE


@njit(**OPTIONS)
def prepare(state, m):
    """Norm (where there is one) and quantise row m of the input. WANTS: 1 for codes, 2 for floats, 3 for both."""
    k, weight, eps = state[at.K], state[at.WEIGHT], floats(state[at.SCALARS])[state[at.NORM_EPS]]
    x = state[at.INPUT] + m * state[at.INPUT_STRIDE] * 4
    blocks = padded(k) // BLOCK
    if state[at.WANTS] & 1:
        tokens = state[at.TOKENS]
        first = m // tokens * tokens
        out = state[at.CODES] + (first * blocks + m - first) * BLOCK
        sums = state[at.SUMS] + m * (blocks + 1) * 4
        floats(state[at.SCALES])[m] = quantize_row(x, weight, k, eps, out, tokens * BLOCK, sums)
        part, total = ints(sums), 0
        for block in range(blocks):
            total += part[block]
        part[blocks] = total
    if state[at.WANTS] & 2 and weight != 0:
        rms_norm(x, weight, k, eps, state[at.PLAIN] + m * padded(k) * 4)


@njit(**OPTIONS)
def cache_of(state, m):
    """The cache of row m: capacity, then keys and values of each layer."""
    return longs(state[at.CACHES] + longs(state[at.SEQUENCES])[m] * (1 + 2 * state[at.LAYERS]) * 8)


@njit(**OPTIONS)
def rotate_row(state, m):
    """Queries of row m normed (where there is a norm) and turned in place; its keys likewise, and its values, into the
    cache."""
    dim = state[at.HEAD_DIM]
    size, position = dim * 4, longs(state[at.POSITIONS])[m]
    cos, sin = state[at.COS] + position * (dim // 2) * 4, state[at.SIN] + position * (dim // 2) * 4
    cache, heads = cache_of(state, m), state[at.HEADS]
    keys, values = cache[1 + 2 * state[at.LAYER]], cache[2 + 2 * state[at.LAYER]]
    norms = longs(state[at.NORMS] + state[at.LAYER] * at.LAYER_NORMS * 8)
    eps = floats(state[at.SCALARS])[at.EPS]
    for i in range(heads + state[at.KV_HEADS]):
        here = state[at.Q] + (m * heads + i) * size
        there = here
        if i >= heads:
            here = state[at.KEYS] + (m * state[at.KV_HEADS] + i - heads) * size
            there = keys + ((i - heads) * cache[0] + position) * size
        weight = norms[at.Q_NORM if i < heads else at.K_NORM]
        if weight != 0:
            norm_row(here, weight, dim, eps, here)
        rotate(here, cos, sin, dim // 2, there)
    for h in range(state[at.KV_HEADS]):
        source = floats(state[at.VALUES] + (m * state[at.KV_HEADS] + h) * size)
        target = floats(values + (h * cache[0] + position) * size)
        for d in range(dim):
            target[d] = source[d]


@njit(**OPTIONS)
def attend_item(state, item, worker):
    """One row and a team of query heads that share keys; neighbouring items share them too."""
    m, team, dim = item % state[at.ROWS], state[at.TEAM], state[at.HEAD_DIM]
    h = item // state[at.ROWS] * team
    cache = cache_of(state, m)
    head = h // (state[at.HEADS] // state[at.KV_HEADS]) * cache[0] * dim * 4
    attend(
        state[at.Q] + (m * state[at.HEADS] + h) * dim * 4,
        team,
        cache[1 + 2 * state[at.LAYER]] + head,
        cache[2 + 2 * state[at.LAYER]] + head,
        longs(state[at.POSITIONS])[m] + 1,
        dim,
        floats(state[at.SCALARS])[at.ATTENTION_SCALE],
        state[at.SCRATCH] + worker * state[at.SCRATCH_BYTES] + state[at.SCORES_AT],
        state[at.ATTENTION] + (m * padded(state[at.HEADS] * dim) + h * dim) * 4,
    )


@njit(**OPTIONS)
def place(state, job, item):
    """(linear, its tile, out, floats between rows of out) of an item of QKV, OUT, GATE_UP, DOWN or SINGLE."""
    if job == at.SINGLE:
        which = state[at.WHICH]
        if which in (at.GATE_PROJ, at.UP_PROJ):
            return which, item, state[at.GATE if which == at.GATE_PROJ else at.UP], padded(state[at.FFN])
        if which in (at.O_PROJ, at.DOWN_PROJ):
            return which, item, state[at.X], padded(state[at.HIDDEN])
        if which == at.Q_PROJ:
            return which, item, state[at.Q], state[at.HEADS] * state[at.HEAD_DIM]
        return which, item, state[at.KEYS if which == at.K_PROJ else at.VALUES], state[at.KV_HEADS] * state[at.HEAD_DIM]
    if job in (at.OUT, at.DOWN):
        return (at.O_PROJ if job == at.OUT else at.DOWN_PROJ), item, state[at.X], padded(state[at.HIDDEN])
    if job == at.GATE_UP:
        return at.GATE_PROJ, item, state[at.GATE], padded(state[at.FFN])
    queries, keys = tiles(state, at.Q_PROJ), tiles(state, at.K_PROJ)
    dim = state[at.HEAD_DIM]
    if item < queries:
        return at.Q_PROJ, item, state[at.Q], state[at.HEADS] * dim
    if item < queries + keys:
        return at.K_PROJ, item - queries, state[at.KEYS], state[at.KV_HEADS] * dim
    return at.V_PROJ, item - queries - keys, state[at.VALUES], state[at.KV_HEADS] * dim


@njit(**OPTIONS)
def linear_item(state, job, item, worker):
    """A tile of a linear on the prepared input; for GATE_UP the same tile of both, then the gate."""
    which, tile, out, stride = place(state, job, item)
    plain, plain_stride = state[at.INPUT], state[at.INPUT_STRIDE]
    if state[at.WEIGHT] != 0:
        plain, plain_stride = state[at.PLAIN], padded(state[at.K])
    n0 = tile * at.TILE
    n1 = min(n0 + at.TILE, longs(linear_at(state, which))[at.N])
    for i in range(2 if job == at.GATE_UP else 1):
        to = state[at.UP] if i == 1 else out
        add = which in (at.O_PROJ, at.DOWN_PROJ)
        e = longs(linear_at(state, which + i))
        if e[at.RANK] == 0:
            linear_rows(state, e, plain, plain_stride, n0, n1, to, stride, add, worker)
        else:
            room = state[at.SCRATCH] + worker * state[at.SCRATCH_BYTES] + state[at.PLAIN_TILE_AT]
            linear_rows(state, e, plain, plain_stride, n0, n1, room - n0 * 4, at.TILE, False, worker)
            adapted(state, e, which + i, room, n0, n1, to, stride, add)
    if job == at.GATE_UP:
        for m in range(state[at.ROWS]):
            here = (m * stride + n0) * 4
            gated(out + here, state[at.UP] + here, n1 - n0, state[at.SILU])


@njit(**OPTIONS)
def low_item(state, item):
    """x A of one row and one linear."""
    which = state[at.LOW_FIRST] + item // state[at.ROWS]
    e = longs(linear_at(state, which))
    if e[at.RANK] != 0:
        low_row(state, e, which, item % state[at.ROWS])


@njit(**OPTIONS)
def gated_row(state, m):
    """The gate of row m, where gate and up were not computed together."""
    here = m * padded(state[at.FFN]) * 4
    gated(state[at.GATE] + here, state[at.UP] + here, state[at.FFN], state[at.SILU])


@njit(**OPTIONS)
def final_norm_row(state, i):
    """The last norm of chosen row i."""
    width, eps = padded(state[at.HIDDEN]), floats(state[at.SCALARS])[at.EPS]
    x = state[at.X] + longs(state[at.CHOSEN])[i] * width * 4
    rms_norm(x, state[at.WEIGHT], state[at.HIDDEN], eps, state[at.PLAIN] + i * width * 4)


@njit(**OPTIONS)
def head_tile(state, tile, worker):
    """A tile of the head for the chosen rows."""
    e = longs(linear_at(state, 0))
    n0 = tile * at.TILE
    n1 = min(n0 + at.TILE, e[at.N])
    x, stride = state[at.PLAIN], padded(state[at.HIDDEN])
    sums = state[at.SCRATCH] + worker * state[at.SCRATCH_BYTES] + state[at.LANES_AT]
    float_rows(e, state[at.CHOSEN_ROWS], x, stride, n0, n1, state[at.LOGITS], e[at.N], False, sums)


def work(address, worker):
    """Take items of the state's job until none is left. worker: which thread's scratch memory to use."""
    state = longs(address)
    counter = address + at.COUNTER * 8
    job, items, grain = state[at.JOB], state[at.ITEMS], state[at.GRAIN]
    first = take(counter, grain)
    while first < items:
        for item in range(first, min(first + grain, items)):
            if job == at.PREPARE:
                prepare(state, item)
            elif job == at.ROTATE:
                rotate_row(state, item)
            elif job == at.ATTEND:
                attend_item(state, item, worker)
            elif job == at.FINAL_NORM:
                final_norm_row(state, item)
            elif job == at.GATED:
                gated_row(state, item)
            elif job == at.HEAD:
                head_tile(state, item, worker)
            elif job == at.DOWN_RANK:
                low_item(state, item)
            else:
                linear_item(state, job, item, worker)
        first = take(counter, grain)
