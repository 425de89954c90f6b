"""Pages of a mapped file: given back when an array over them has been used, so that one-pass reading takes little memory."""

from __future__ import annotations

import mmap

import numpy as np


def release(array: np.ndarray) -> None:
    """Let the system drop the pages under a read-only view of a mapped file; they come back from the file when touched.

    Does nothing for an array that owns its memory, or where the system has no such call.
    """
    if array.flags.writeable or array.size == 0 or not array.flags.c_contiguous or not hasattr(mmap, "MADV_DONTNEED"):
        return
    owner: object = array
    while isinstance(owner, np.ndarray):
        whole, owner = owner, owner.base
    mapped = owner.obj if isinstance(owner, memoryview) else owner
    if not isinstance(mapped, mmap.mmap):
        return
    start = np.frombuffer(mapped, np.uint8, 1).ctypes.data
    del whole
    first = -(-(array.ctypes.data - start) // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = array.ctypes.data - start + array.nbytes
    if stop < len(mapped):  # the last page of the file may go whole
        stop = stop // mmap.PAGESIZE * mmap.PAGESIZE
    if stop > first:
        mapped.madvise(mmap.MADV_DONTNEED, first, stop - first)
