"""What macOS tells by its C library: this process's resident set and footprint, the machine's pages, its processor's name.

The footprint (TASK_VM_INFO's phys_footprint) is the figure of Activity Monitor: it counts compressed pages and memory that
the GPU holds for the process, which the resident set leaves out. Layouts: mach/task_info.h, mach/vm_statistics.h.
"""

from __future__ import annotations

import ctypes
from typing import Any

_TASK_VM_INFO = 22
_HOST_VM_INFO64 = 4
_WORDS = 128  # 32-bit words of the answers' room; the kernel writes what it knows
_FREE, _INACTIVE = 0, 2  # words of vm_statistics64
_NAME = 256  # bytes of a name's room


class _TaskVmInfo(ctypes.Structure):
    """task_vm_info to its first revision."""

    _pack_ = 4
    _layout_ = "ms"
    _fields_ = [
        ("virtual_size", ctypes.c_uint64), ("region_count", ctypes.c_int32), ("page_size", ctypes.c_int32),
        *((name, ctypes.c_uint64) for name in (
            "resident_size", "resident_size_peak", "device", "device_peak", "internal", "internal_peak", "external",
            "external_peak", "reusable", "reusable_peak", "purgeable_volatile_pmap", "purgeable_volatile_resident",
            "purgeable_volatile_virtual", "compressed", "compressed_peak", "compressed_lifetime", "phys_footprint",
        )),
    ]  # fmt: skip


class Mach:
    """The calls. library: the C library, which a test may stand in for."""

    def __init__(self, library: Any = None) -> None:
        self._c = ctypes.CDLL(None) if library is None else library
        self._host = self._c.mach_host_self()  # once: each call takes one more reference to the port

    def task(self) -> tuple[int, int] | None:
        """(resident bytes, footprint bytes) of this process; None where the system refuses."""
        info = _TaskVmInfo()
        count = ctypes.c_uint32(ctypes.sizeof(info) // 4)
        task = self._c.mach_task_self()
        if self._c.task_info(task, _TASK_VM_INFO, ctypes.byref(info), ctypes.byref(count)) != 0:
            return None
        return int(info.resident_size), int(info.phys_footprint)

    def available(self) -> int | None:
        """Bytes of free and inactive pages: what can be had without swapping."""
        words = (ctypes.c_uint32 * _WORDS)()
        count = ctypes.c_uint32(_WORDS)
        if self._c.host_statistics64(self._host, _HOST_VM_INFO64, ctypes.byref(words), ctypes.byref(count)) != 0:
            return None
        page = ctypes.c_size_t(
            0
        )  # the kernel's, in which it counts: a process under Rosetta has smaller ones of its own
        self._c.host_page_size(self._host, ctypes.byref(page))
        return (words[_FREE] + words[_INACTIVE]) * page.value

    def total(self) -> int | None:
        """Bytes of memory in the machine (hw.memsize)."""
        value, size = ctypes.c_uint64(0), ctypes.c_size_t(8)
        if self._c.sysctlbyname(b"hw.memsize", ctypes.byref(value), ctypes.byref(size), None, 0) != 0:
            return None
        return int(value.value)

    def processor(self) -> str | None:
        """The processor's name (machdep.cpu.brand_string), such as "Apple M2 Pro"."""
        text, size = ctypes.create_string_buffer(_NAME), ctypes.c_size_t(_NAME)
        if self._c.sysctlbyname(b"machdep.cpu.brand_string", text, ctypes.byref(size), None, 0) != 0:
            return None
        return text.value.decode("utf-8", "replace") or None
