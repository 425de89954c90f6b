"""A compiled kernel run over its whole grid, by the runtime, on copies of the launch's arrays."""

from __future__ import annotations

import ctypes
import threading

import ml_dtypes
import numpy as np

from tests.emulator import compiler
from tests.emulator.text import Parameter
from tests.support.tally import here

# Where place_threads (runtime/grid.cpp) puts what Metal calls by these names.
POSITIONS = {
    "thread_position_in_grid": ("uint3", 0),
    "thread_position_in_threadgroup": ("uint3", 3),
    "threadgroup_position_in_grid": ("uint3", 6),
    "threads_per_threadgroup": ("uint3", 9),
    "threadgroups_per_grid": ("uint3", 12),
    "threads_per_grid": ("uint3", 15),
    "grid_size": ("uint3", 15),
    "dispatch_threads_per_threadgroup": ("uint3", 18),
    "thread_index_in_threadgroup": ("uint", 21),
    "thread_index_in_simdgroup": ("uint", 22),
    "simdgroup_index_in_threadgroup": ("uint", 23),
    "simdgroups_per_threadgroup": ("uint", 24),
    "dispatch_simdgroups_per_threadgroup": ("uint", 25),
    "threads_per_simdgroup": ("uint", 26),
    "thread_execution_width": ("uint", 26),
    "thread_index_in_quadgroup": ("uint", 27),
    "quadgroup_index_in_threadgroup": ("uint", 28),
    "quadgroups_per_threadgroup": ("uint", 29),
    "grid_origin": ("uint3", 30),
}
_INPUT, _OUTPUT = 0, 1
_CELL_BYTES = 24
LIMIT_SECONDS = 120  # of processor time for one grid: a loop that does not end is reported
_lock = threading.Lock()  # the runtime has one grid


class FaultError(AssertionError):
    """A kernel did what a GPU would not forgive, or not the same way twice."""


class _Region(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("item", ctypes.c_uint32),
        ("kind", ctypes.c_uint32),
        ("cells", ctypes.c_void_p),
    )


def numpy_dtype(name: str) -> np.dtype:
    """The numpy dtype of an MLX dtype's name."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype("bool" if name == "bool_" else name)


def _aligned(array: np.ndarray) -> np.ndarray:
    """A copy that starts at a multiple of 256 bytes, as MLX's buffers do."""
    raw = np.empty(array.nbytes + 256, np.uint8)
    start = -raw.ctypes.data % 256
    view = raw[start : start + array.nbytes]
    view[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return view


class Buffers:
    """The memory of one run: a region for each of the kernel's buffers."""

    def __init__(self, inputs: dict[str, np.ndarray], outputs: dict[str, tuple[tuple[int, ...], str]]) -> None:
        self.inputs, self.outputs = inputs, outputs
        self.regions: list[_Region] = []
        self.written: list[tuple[str, np.ndarray, np.ndarray]] = []  # name, data, cells
        self._held: list[np.ndarray] = []

    def add(self, name: str) -> int:
        """Make the buffer that a parameter names; returns its address."""
        if name in self.outputs:
            dims, dtype = self.outputs[name]
            item = numpy_dtype(dtype).itemsize
            data = _aligned(np.full(int(np.prod(dims)) * item, 0xFF, np.uint8))
            cells = np.zeros((int(np.prod(dims)), _CELL_BYTES), np.uint8)
            self.written.append((name, data, cells))
            return self._region(name, data, item, _OUTPUT, cells)
        array = self.inputs[name] if name in self.inputs else _about(name, self.inputs)
        return self._region(name, _aligned(array), array.itemsize, _INPUT, None)

    def _region(self, name: str, data: np.ndarray, item: int, kind: int, cells: np.ndarray | None) -> int:
        self._held += [data] if cells is None else [data, cells]
        address = data.ctypes.data
        at = None if cells is None else cells.ctypes.data
        self.regions.append(_Region(name.encode(), address, data.nbytes, item, kind, at))
        return address

    def results(self) -> list[np.ndarray]:
        """The outputs. Raises FaultError if a part of one was never written."""
        found = []
        for name, data, cells in self.written:
            dims, dtype = self.outputs[name]
            missing = int((cells.view(np.uint32)[:, 0] == 0).sum())
            if missing:
                raise FaultError(f"{missing} of {len(cells)} elements of the output {name} are never written")
            found.append(data.view(numpy_dtype(dtype)).reshape(dims).copy())
        return found


def run(
    library: ctypes.CDLL,
    parameters: list[Parameter],
    buffers: Buffers,
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    seed: int,
    flags: tuple[str, ...] = (),
) -> list[np.ndarray]:
    """The outputs. Raises FaultError, with what the runtime found."""
    assert np.prod(threadgroup) <= 1024, f"a threadgroup of {threadgroup}: Metal takes 1024 threads"
    assert min(grid) > 0 and min(threadgroup) > 0, f"an empty grid {grid} or threadgroup {threadgroup}"
    shape = tuple(min(g, t) for g, t in zip(grid, threadgroup, strict=True))
    addresses = [buffers.add(p.name) for p in parameters if p.space]
    message = ctypes.create_string_buffer(2048)
    with _lock:
        failed = compiler.runtime().emulator_run(
            ctypes.cast(library.emulator_entry, ctypes.c_void_p),
            (ctypes.c_uint64 * len(addresses))(*addresses),
            (_Region * len(addresses))(*buffers.regions),
            ctypes.c_uint32(len(addresses)),
            (ctypes.c_uint32 * 3)(*grid),
            (ctypes.c_uint32 * 3)(*shape),
            ctypes.c_uint64(seed),
            ctypes.c_uint32("flush_float" in flags),
            ctypes.c_uint32(LIMIT_SECONDS),
            message,
            ctypes.c_size_t(len(message)),
        )
        here.runs += 1
    if failed:
        raise FaultError(message.value.decode())
    return buffers.results()


def _about(name: str, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """x_shape, x_strides and x_ndim, as MLX passes them."""
    of, _, what = name.rpartition("_")
    x = inputs[of]
    if what == "shape":
        return np.array(x.shape, np.int32)
    if what == "ndim":
        return np.array(x.ndim, np.int32)
    assert what == "strides", f"a parameter that is no input: {name}"
    return np.array([s // x.itemsize for s in np.ascontiguousarray(x).strides], np.int64)
