"""What an adapter adds to a linear's outputs, in the order of numpy_ref.adapted. B's rows are padded to whole lanes."""

from __future__ import annotations

from numba import njit

from bitnet_mlx.backends.cpu_jit import layout as at
from bitnet_mlx.backends.cpu_jit.emit import LANES
from bitnet_mlx.backends.cpu_jit.floats import OPTIONS, ZERO, apart, dot, floats
from bitnet_mlx.backends.cpu_jit.linear import put


@njit(**OPTIONS)
def lanes_of(rank):
    """A rank in whole lanes."""
    return (rank + LANES - 1) // LANES * LANES


@njit(**OPTIONS)
def low_at(state, which, m):
    """Where row m of x A lies, for linear `which` of those on the present input."""
    return state[at.LOW] + ((which - state[at.LOW_FIRST]) * state[at.ROWS] + m) * state[at.LOW_WIDTH] * 4


@njit(**OPTIONS)
def low_row(state, e, which, m):
    """Row m of x A; the lanes past the rank hold 0."""
    apart()
    x, out = state[at.LOW_INPUT] + m * state[at.LOW_STRIDE] * 4, floats(low_at(state, which, m))
    k, rank = e[at.WIDTH], e[at.RANK]
    for j in range(rank):
        out[j] = dot(e[at.LOW_A] + j * k * 4, x, k)
    for j in range(rank, lanes_of(rank)):
        out[j] = ZERO


@njit(**OPTIONS)
def adapted(state, e, which, tile, n0, n1, out, stride, add):
    """Outputs n0 .. n1 of every row, float32 [rows, TILE] at `tile`, with the adapter's part: to out, or added to it."""
    apart()
    width = lanes_of(e[at.RANK])
    factor, gain = floats(e[at.FACTOR])[0], floats(e[at.GAIN])
    for m in range(state[at.ROWS]):
        low, y = low_at(state, which, m), floats(tile + m * at.TILE * 4)
        for n in range(n0, n1):
            value = y[n - n0] + factor * dot(e[at.LOW_B] + n * width * 4, low, width)
            if e[at.GAIN] != 0:
                value = gain[n] * value
            put(out + (m * stride + n) * 4, value, e[at.LATE_BIAS], n, add)
