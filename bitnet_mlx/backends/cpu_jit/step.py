"""One compiled call for all layers and the head: `step(address of the state)`.

A job is a number of items; every thread takes the next items from a shared counter until none is left, so a thread that
is held up (another process on its core) holds up little. There is one parallel region in the text, whatever the job,
and a small job runs on the calling thread alone. A step of one row has five parallel jobs a layer; its norms are serial.

`work` is linked by name (see compiled.py): numba would otherwise compile its text again at each level of calls.
"""

from __future__ import annotations

from numba import njit, prange, types

from bitnet_mlx.backends.cpu_jit.floats import OPTIONS, longs
from bitnet_mlx.backends.cpu_jit.jobs import linear_at, padded, tiles
from bitnet_mlx.backends.cpu_jit.layout import (
    ATTEND, ATTENTION, CHOSEN_ROWS, COUNTER, DOWN, DOWN_NORM, DOWN_PROJ, FFN, FFN_NORM, FINAL_NORM, GATE, GATE_PROJ,
    GATE_UP, GRAIN, HEAD, HEAD_DIM, HEADS, HIDDEN, INPUT, INPUT_NORM, INPUT_STRIDE, ITEMS, JOB, K, K_PROJ, KIND, LAYER,
    LAYER_NORMS, LAYERS, NORMS, O_PROJ, OUT, OUT_NORM, POSITIONS, PREPARE, Q_PROJ, QKV, ROTATE, ROWS, SERIAL_BELOW, TEAM, TERNARY,
    THREADS, TILE, UP_PROJ, V_PROJ, WANTS, WEIGHT, X,
)  # fmt: skip

WORK = "bitnet_mlx_cpu_work"
work = types.ExternalFunction(WORK, types.void(types.int64, types.int64))


@njit(parallel=True, **OPTIONS)
def region(address, workers):
    for worker in prange(workers):
        work(address, worker)


@njit(**OPTIONS)
def run(address, job, items, grain, size):
    """Run a job of `items` items; size: roughly how many weights times rows it multiplies."""
    state = longs(address)
    state[JOB], state[ITEMS], state[GRAIN], state[COUNTER] = job, items, grain, 0
    workers = min(state[THREADS], (items + grain - 1) // grain)
    if workers <= 1 or size < state[SERIAL_BELOW]:
        work(address, 0)
    else:
        region(address, workers)


@njit(**OPTIONS)
def take_input(address, norm, source, k, stride, first, last):
    """Name the input of linears first .. last, and norm and quantise its rows."""
    state = longs(address)
    state[INPUT], state[K], state[INPUT_STRIDE], state[WANTS] = source, k, stride, 0
    state[WEIGHT] = longs(state[NORMS])[state[LAYER] * LAYER_NORMS + norm]
    for which in range(first, last + 1):
        state[WANTS] |= 1 if longs(linear_at(state, which))[KIND] == TERNARY else 2
    rows = state[ROWS]
    run(address, PREPARE, rows, 1, 8 * rows * k if rows > 1 else 0)


def step(address):
    """All layers on the rows in X, in place; then the head on the chosen rows (CHOSEN_ROWS may be 0)."""
    state = longs(address)
    hidden, dim, rows, ffn = state[HIDDEN], state[HEAD_DIM], state[ROWS], state[FFN]
    queries, wide = state[HEADS] * dim, padded(state[HIDDEN])
    for layer in range(state[LAYERS]):
        state[LAYER] = layer
        take_input(address, INPUT_NORM, state[X], hidden, wide, Q_PROJ, V_PROJ)
        count = tiles(state, Q_PROJ) + tiles(state, K_PROJ) + tiles(state, V_PROJ)
        run(address, QKV, count, 1, count * TILE * hidden * rows)
        run(address, ROTATE, rows, 1, rows * queries if rows > 1 else 0)
        reach = longs(state[POSITIONS])[rows - 1] + 1
        run(address, ATTEND, rows * (state[HEADS] // state[TEAM]), 1, rows * reach * queries * 8)
        take_input(address, OUT_NORM, state[ATTENTION], queries, padded(queries), O_PROJ, O_PROJ)
        run(address, OUT, tiles(state, O_PROJ), 1, hidden * queries * rows)
        take_input(address, FFN_NORM, state[X], hidden, wide, GATE_PROJ, UP_PROJ)
        run(address, GATE_UP, tiles(state, UP_PROJ), 1, 2 * hidden * ffn * rows)
        take_input(address, DOWN_NORM, state[GATE], ffn, padded(ffn), DOWN_PROJ, DOWN_PROJ)
        run(address, DOWN, tiles(state, DOWN_PROJ), 1, hidden * ffn * rows)
    chosen = state[CHOSEN_ROWS]
    if chosen:
        state[LAYER] = state[LAYERS]
        state[WEIGHT] = longs(state[NORMS])[state[LAYERS] * LAYER_NORMS]
        run(address, FINAL_NORM, chosen, 1, chosen * hidden if chosen > 1 else 0)
        count = tiles(state, 0)
        run(address, HEAD, count, 1, count * TILE * hidden * chosen)
