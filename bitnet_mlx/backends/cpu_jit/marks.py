"""When each job of a compiled step ended: written by the step itself, where a profiler asks for it.

The clock is the C library's, read in some tens of nanoseconds; a step that nobody profiles pays one comparison a job.
"""

from __future__ import annotations

from numba import njit, types

from bitnet_mlx.backends.cpu_jit import layout as at
from bitnet_mlx.backends.cpu_jit.clock import CLOCK, available
from bitnet_mlx.backends.cpu_jit.floats import OPTIONS, longs

if available:
    clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.int64))

    @njit(**OPTIONS)
    def note(state):
        """Write the job that ended, its layer and the time."""
        if state[at.MARKED] < state[at.MARKS_ROOM]:
            here = state[at.MARKS] + state[at.MARKED] * at.MARK_FIELDS * 8
            mark = longs(here)
            clock_gettime(CLOCK, here + 8)  # seconds and nanoseconds, in the last two fields
            mark[2] += mark[1] * 1000000000
            which = state[at.WHICH] if state[at.JOB] == at.SINGLE else 0
            which = state[at.LOW_FIRST] if state[at.JOB] == at.DOWN_RANK else which
            mark[0], mark[1] = state[at.JOB] + at.MARK_WHICH * which, state[at.LAYER]
            state[at.MARKED] += 1

else:

    @njit(**OPTIONS)
    def note(state):
        """Windows has no such clock in its C library."""
