"""The operating system's counters, against psutil here and against hand-made answers of macOS's C library."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import psutil
import pytest

from bitnet_mlx.memory import system
from bitnet_mlx.memory.darwin import Mach
from bitnet_mlx.memory.machine import this_machine

LINUX = sys.platform.startswith("linux")


def test_the_resident_set_is_psutils_and_grows_by_what_is_touched() -> None:
    before = system.resident_bytes()
    block = mmap.mmap(-1, 8 << 20)  # new pages; an array may get some that were freed before
    block.write(bytes(8 << 20))
    after = system.resident_bytes()
    assert before is not None
    assert after is not None
    assert after - before == pytest.approx(8 << 20, abs=1 << 20)
    assert after == pytest.approx(psutil.Process().memory_info().rss, abs=1 << 20)
    assert (system.peak_resident_bytes() or 0) >= after - (1 << 20)


@pytest.mark.skipif(not LINUX, reason="elsewhere there is one source")
def test_both_sources_of_the_peak_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    found = system.peak_resident_bytes()
    monkeypatch.setattr(system, "_table", lambda path, key: None)
    assert system.peak_resident_bytes() == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize(
    ("engine", "told", "expected"),
    [
        ("metal", {"max_recommended_working_set_size": 5, "memory_size": 9}, 5), ("cuda", {"memory_size": 9}, 9),
        ("metal", {}, None), ("mlx", {"memory_size": 9}, None), ("cpu", {"memory_size": 9}, None),
    ],
)  # fmt: skip
def test_what_a_gpu_may_hold_is_mlxs_word(
    engine: str, told: dict[str, int], expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx, "device_info", lambda device: told)
    found = this_machine(engine)
    assert found.working_set == expected
    assert found.total == system.total_bytes()


def test_the_machine_is_psutils() -> None:
    machine = psutil.virtual_memory()
    total, available = system.total_bytes("/nowhere"), system.available_bytes("/nowhere")
    assert total == machine.total
    assert available == pytest.approx(machine.available, rel=0.1)


@pytest.mark.skipif(not LINUX, reason="control groups are Linux's")
@pytest.mark.parametrize("names", [("memory.max", "memory.current"),
                                   ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")])  # fmt: skip
def test_a_container_has_what_it_is_given(tmp_path: Path, names: tuple[str, str]) -> None:
    (tmp_path / "memory").mkdir()
    for name, value in zip(names, (300 << 20, 100 << 20), strict=True):
        (tmp_path / name).write_text(f"{value}\n")
    assert system.total_bytes(str(tmp_path)) == 300 << 20
    assert system.available_bytes(str(tmp_path)) == 200 << 20
    system._cgroup_files.cache_clear()
    (tmp_path / names[0]).write_text("max\n" if "." in names[0][:7] else f"{1 << 62}\n")
    assert system.total_bytes(str(tmp_path)) == psutil.virtual_memory().total


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has a footprint")
def test_no_footprint_elsewhere() -> None:
    assert system.footprint_bytes() is None


class Library:
    """macOS's C library: answers laid out by hand after mach/task_info.h and mach/vm_statistics.h."""

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails
        self.asked: list[tuple[str, int]] = []
        self.hosts = 0

    def mach_task_self(self) -> int:
        return 7

    def mach_host_self(self) -> int:
        self.hosts += 1
        return 8

    def host_page_size(self, host: int, place: Any) -> int:
        assert host == 8
        place._obj.value = 16384
        return 0

    def _answer(self, what: tuple[str, int], place: Any, count: Any, answer: bytes) -> int:
        self.asked.append(what)
        if self.fails:
            return 5
        room = count._obj.value * 4
        ctypes.memmove(place, answer, min(room, len(answer)))
        count._obj.value = min(room, len(answer)) // 4
        return 0

    def task_info(self, task: int, flavor: int, place: Any, count: Any) -> int:
        # virtual size, region count, page size, resident size, 15 figures more, phys_footprint, and what came later
        answer = struct.pack("<QiiQ", 1 << 40, 3, 16384, 111_000_000) + struct.pack("<15Q", *range(15))
        answer += struct.pack("<3Q", 222_000_000, 8, 9)
        return self._answer(("task", flavor), place, count, answer)

    def host_statistics64(self, host: int, flavor: int, place: Any, count: Any) -> int:
        return self._answer(("host", flavor), place, count, struct.pack("<4I", 1000, 5000, 2000, 700) + bytes(96))

    def sysctlbyname(self, name: bytes, place: Any, size: Any, new: Any, length: int) -> int:
        if name == b"hw.memsize":
            place._obj.value = 64 << 30
        else:
            assert name == b"machdep.cpu.brand_string" and size._obj.value == ctypes.sizeof(place) > 40
            place.value = b"Apple M2 Pro"
        return -1 if self.fails else 0


def test_macos_answers_are_read_by_their_layout() -> None:
    library = Library()
    mach = Mach(library)
    assert mach.task() == (111_000_000, 222_000_000)
    assert mach.available() == 3000 * 16384
    assert mach.total() == 64 << 30
    assert mach.processor() == "Apple M2 Pro"
    assert library.asked == [("task", 22), ("host", 4)]
    mach.available()
    assert library.hosts == 1, "each call leaves a reference to the host's port"


def test_macos_that_refuses_is_unknown() -> None:
    mach = Mach(Library(fails=True))
    assert (mach.task(), mach.available(), mach.total(), mach.processor()) == (None,) * 4


def test_on_macos_the_footprint_and_pages_are_what_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "_mach", lambda: Mach(Library()))
    assert system.resident_bytes() == 111_000_000
    assert system.footprint_bytes() == 222_000_000
    assert system.total_bytes() == 64 << 30
    assert system.available_bytes() == 3000 * 16384
    assert system.processor() == "Apple M2 Pro"


def test_a_system_that_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "_table", lambda path, key: None)
    assert system.total_bytes("/nowhere") is None
    assert system.available_bytes("/nowhere") is None


@pytest.mark.skipif(not LINUX, reason="/proc is Linux's")
def test_mapped_pages_count(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(1 << 20) * 8)
    mapped = np.memmap(path, np.uint8, "r")
    before = system.resident_bytes() or 0
    assert int(mapped[::4096].sum()) >= 0
    assert (system.resident_bytes() or 0) - before >= 7 << 20
