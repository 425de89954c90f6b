"""One compiled call for all layers and the head: `step(address of the state)`.

A job is a number of items; every thread takes the next items from a shared counter until none is left, so a thread that
is held up (another process on its core) holds up little. There is one parallel region in the text, whatever the job,
and a small job runs on the calling thread alone. A step of one row has five parallel jobs a layer; its norms are serial.

`work` is linked by name (see compiled.py): numba would otherwise compile its text again at each level of calls.
"""

from __future__ import annotations

from numba import njit, prange, types

from bitnet_mlx.backends.cpu_jit import layout as at
from bitnet_mlx.backends.cpu_jit.floats import OPTIONS, longs
from bitnet_mlx.backends.cpu_jit.jobs import linear_at, padded, tiles
from bitnet_mlx.backends.cpu_jit.marks import note

WORK = "bitnet_mlx_cpu_work"
work = types.ExternalFunction(WORK, types.void(types.int64, types.int64))


@njit(parallel=True, **OPTIONS)
def region(address, workers):
    """The one parallel region: every worker takes items."""
    for worker in prange(workers):
        work(address, worker)


@njit(**OPTIONS)
def run(address, job, items, grain, size):
    """Run a job of `items` items; size: roughly how many weights times rows it multiplies."""
    state = longs(address)
    state[at.JOB], state[at.ITEMS], state[at.GRAIN], state[at.COUNTER] = job, items, grain, 0
    workers = min(state[at.THREADS], (items + grain - 1) // grain)
    if workers <= 1 or size < state[at.SERIAL_BELOW]:
        work(address, 0)
    else:
        region(address, workers)
    if state[at.MARKS] != 0:
        note(state)


@njit(**OPTIONS)
def stretch(state, items, rows):
    """How many tiles a thread takes at once. One row of activations reads each weight once, and memory answers best to long
    runs of it; more rows are bound by arithmetic, where small portions share the work more evenly."""
    return max(1, items // (at.PORTIONS * state[at.THREADS])) if rows == 1 else 1


@njit(**OPTIONS)
def take_input(address, norm, source, k, stride, first, last):
    """Name the input of linears first .. last, and norm and quantise its rows. norm: address of a weight, or 0."""
    state = longs(address)
    state[at.INPUT], state[at.K], state[at.INPUT_STRIDE], state[at.WANTS] = source, k, stride, 0
    state[at.WEIGHT], state[at.NORM_EPS] = norm, at.EPS
    for which in range(first, last + 1):
        e = longs(linear_at(state, which))
        state[at.WANTS] |= (1 if e[at.KIND] == at.TERNARY else 2) | (2 if e[at.RANK] != 0 else 0)
    rows = state[at.ROWS]
    run(address, at.PREPARE, rows, 1, 8 * rows * k if rows > 1 else 0)


@njit(**OPTIONS)
def through_rank(address, source, stride, first, last):
    """x A of the adapters of linears first .. last, where there are any. source, stride: their float inputs."""
    state = longs(address)
    size = 0
    for which in range(first, last + 1):
        e = longs(linear_at(state, which))
        size += e[at.RANK] * e[at.WIDTH]
    if size != 0:
        state[at.LOW_FIRST], state[at.LOW_INPUT], state[at.LOW_STRIDE] = first, source, stride
        run(address, at.DOWN_RANK, (last - first + 1) * state[at.ROWS], 1, size * state[at.ROWS])


@njit(**OPTIONS)
def separately(address, norm, source, k, stride, first, last):
    """Linears first .. last, of which some have a norm of their own, one after another."""
    state = longs(address)
    rows, normed, normed_stride = state[at.ROWS], source, stride
    if norm != 0:
        state[at.INPUT], state[at.K], state[at.INPUT_STRIDE], state[at.WANTS] = source, k, stride, 2
        state[at.WEIGHT], state[at.NORM_EPS] = norm, at.EPS
        run(address, at.PREPARE, rows, 1, 8 * rows * k)
        # What was normed stays in a buffer of its own; the linears' norms write to the other.
        state[at.PLAIN], state[at.NORMED] = state[at.NORMED], state[at.PLAIN]
        normed, normed_stride = state[at.NORMED], padded(k)
    for which in range(first, last + 1):
        e = longs(linear_at(state, which))
        state[at.K], state[at.WHICH] = k, which
        if e[at.NORM] != 0:
            state[at.INPUT], state[at.INPUT_STRIDE] = normed, normed_stride
            state[at.WEIGHT], state[at.NORM_EPS] = e[at.NORM], at.LINEAR_EPS
        else:
            state[at.INPUT], state[at.INPUT_STRIDE] = source, stride
            state[at.WEIGHT], state[at.NORM_EPS] = norm, at.EPS
        state[at.WANTS] = 1 if e[at.KIND] == at.TERNARY else 2
        through_rank(address, normed, normed_stride, which, which)
        run(address, at.PREPARE, rows, 1, 8 * rows * k)
        count = tiles(state, which)
        run(address, at.SINGLE, count, stretch(state, count, rows), e[at.N] * k * rows)
    if first == at.GATE_PROJ:
        run(address, at.GATED, rows, 1, 8 * rows * state[at.FFN])


@njit(**OPTIONS)
def linears(address, job, norm, source, k, stride, first, last):
    """Linears first .. last on one input, behind the layer's norm of this number."""
    state = longs(address)
    weight = longs(state[at.NORMS])[state[at.LAYER] * at.LAYER_NORMS + norm]
    count, own = 0, False
    for which in range(first, last + 1):
        count += tiles(state, which)
        own = own or longs(linear_at(state, which))[at.NORM] != 0
    if own:
        separately(address, weight, source, k, stride, first, last)
        return
    take_input(address, weight, source, k, stride, first, last)
    plain, plain_stride = (source, stride) if weight == 0 else (state[at.PLAIN], padded(k))
    through_rank(address, plain, plain_stride, first, last)
    items = count // 2 if job == at.GATE_UP else count  # an item covers a tile of both
    run(address, job, items, stretch(state, items, state[at.ROWS]), count * at.TILE * k * state[at.ROWS])


def step(address):
    """All layers on the rows in X, in place; then the head on the chosen rows (CHOSEN_ROWS may be 0)."""
    state = longs(address)
    if state[at.MARKS] != 0:
        state[at.JOB] = at.ENTER
        note(state)
    hidden, dim, rows, ffn = state[at.HIDDEN], state[at.HEAD_DIM], state[at.ROWS], state[at.FFN]
    queries, wide = state[at.HEADS] * dim, padded(state[at.HIDDEN])
    for layer in range(state[at.LAYERS]):
        state[at.LAYER] = layer
        linears(address, at.QKV, at.INPUT_NORM, state[at.X], hidden, wide, at.Q_PROJ, at.V_PROJ)
        run(address, at.ROTATE, rows, 1, rows * queries if rows > 1 else 0)
        reach = longs(state[at.POSITIONS])[rows - 1] + 1
        run(address, at.ATTEND, rows * (state[at.HEADS] // state[at.TEAM]), 1, rows * reach * queries * 8)
        linears(address, at.OUT, at.OUT_NORM, state[at.ATTENTION], queries, padded(queries), at.O_PROJ, at.O_PROJ)
        linears(address, at.GATE_UP, at.FFN_NORM, state[at.X], hidden, wide, at.GATE_PROJ, at.UP_PROJ)
        linears(address, at.DOWN, at.DOWN_NORM, state[at.GATE], ffn, padded(ffn), at.DOWN_PROJ, at.DOWN_PROJ)
    chosen = state[at.CHOSEN_ROWS]
    if chosen:
        state[at.LAYER] = state[at.LAYERS]
        state[at.WEIGHT] = longs(state[at.NORMS])[state[at.LAYERS] * at.LAYER_NORMS]
        run(address, at.FINAL_NORM, chosen, 1, chosen * hidden if chosen > 1 else 0)
        count = tiles(state, 0)
        run(address, at.HEAD, count, stretch(state, count, chosen), count * at.TILE * hidden * chosen)
