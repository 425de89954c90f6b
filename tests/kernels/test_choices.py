"""The file of choices: what is in it is trusted only while it is whole, and concurrent writers lose nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bitnet_mlx.backends import mlx_device
from bitnet_mlx.backends.cache_root import VARIABLE
from bitnet_mlx.backends.kernels import attention, source
from bitnet_mlx.backends.kernels import choices as module
from bitnet_mlx.backends.kernels.choices import Choice, Choices

ROOT = Path(__file__).resolve().parents[2]
FAST = Choice("matvec rows 4", time=5.5, stock=13.25, bfloat16=9.5)
OFF = Choice(None, "3 of 10 outputs are wrong", fault=True, ties=2)
PROGRAM = """
import sys
from bitnet_mlx.backends.kernels.choices import Choice, Choices
choices = Choices("metal", "Apple M1", "0.32.4")
for i in range(25):
    choices.put(f"{sys.argv[1]} {i}", Choice(f"kernel {i}", time=1.0 + i))
    if i == 0:
        print("started", flush=True)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


def fresh(platform: str = "metal", chip: str = "Apple M1", version: str = "0.32.4") -> Choices:
    """As another process would see it."""
    return Choices(platform, chip, version)  # type: ignore[arg-type]


def test_what_was_put_is_found_by_the_next_process(folder: Path) -> None:
    choices = fresh()
    assert choices.get("product 3 10 1") is None
    choices.put("product 3 10 1", FAST)
    choices.put("quantise 10", OFF)
    assert fresh().all() == {"product 3 10 1": FAST, "quantise 10": OFF}
    names = sorted(p.suffix for p in folder.iterdir())
    assert names == [".json", ".lock"]  # no draft stayed


def test_another_chip_version_platform_or_source_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh().put("a", FAST)
    assert fresh("cuda").get("a") is fresh(chip="Apple M2").get("a") is fresh(version="0.33").get("a") is None
    assert Choices("metal", "Apple M1", "0.32.4", "macOS 26.2").get("a") is None
    assert fresh().get("a") == FAST
    monkeypatch.setattr(module, "kernels_digest", lambda: "other sources")
    assert fresh().get("a") is None


@pytest.mark.parametrize("file", ["decode_attention.metal", "packed.h", "common.h"])
def test_a_compiled_kernel_is_named_after_all_of_its_text(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX keeps compiled kernels by name."""
    read, before = source.read, attention.SOURCE.digest("metal")
    monkeypatch.setattr(source, "read", lambda name: read(name) + ("int edited;\n" if name == file else ""))
    assert attention.SOURCE.digest("metal") != before


def test_a_device_asks_anew_when_its_system_was_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's compiler makes the kernels."""
    paths = set()
    for system in ("macOS 26.1", "macOS 26.2"):
        monkeypatch.setattr(mlx_device, "_system", lambda system=system: system)
        paths.add(mlx_device.choices("metal").path)
    assert len(paths) == 2


def test_the_digest_covers_kernels_and_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    first = module.kernels_digest()
    seen: list[str] = []
    read = Path.read_bytes
    for target in ("common.h", "dp4a.py"):

        def changed(self: Path, target: str = target) -> bytes:
            seen.append(self.name)
            return read(self) + (b" " if self.name == target else b"")

        monkeypatch.setattr(Path, "read_bytes", changed)
        module.kernels_digest.cache_clear()
        assert module.kernels_digest() != first
    monkeypatch.undo()
    module.kernels_digest.cache_clear()
    assert module.kernels_digest() == first and {"common.h", "launch.py", "matvec_dp4a.cu"} <= set(seen)


@pytest.mark.parametrize(
    "damage", ["deleted", "empty", "truncated", "garbage", "bytes", "list", "other", "deep", "huge", "folder deleted"]
)
def test_a_damaged_file_counts_as_empty_and_is_written_again(damage: str, folder: Path) -> None:
    choices = fresh()
    choices.put("a", FAST)
    path = choices.path
    whole = path.read_bytes()
    if damage == "deleted":
        path.unlink()
    elif damage == "folder deleted":
        for entry in folder.iterdir():
            entry.unlink()
        folder.rmdir()
    else:
        path.write_bytes(
            {
                "empty": b"",
                "truncated": whole[: len(whole) // 2],
                "garbage": b"{not json",
                "bytes": bytes(range(256)),
                "list": b"[1, 2]",
                "other": whole.replace(b"Apple M1", b"Apple M9"),
                "deep": b"[" * 100_000,
                "huge": b" " * (5 << 20) + whole,
            }[damage]
        )
    again = fresh()
    assert again.get("a") is None
    again.put("b", OFF)
    assert fresh().all() == {"b": OFF}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("label", 3), ("label", ["x"]), ("reason", None), ("fault", 1), ("time", "fast"), ("time", -1.0), ("time", True),
        ("time", float("nan")), ("stock", float("inf")), ("bfloat16", [1]), ("ties", 1.5), ("ties", -1), ("more", 1),
    ],
)  # fmt: skip
def test_an_entry_of_foreign_types_is_asked_again_and_its_neighbours_stay(name: str, value: Any) -> None:
    choices = fresh()
    choices.put("bad", FAST)
    choices.put("good", OFF)
    document = json.loads(choices.path.read_text())
    document["entries"]["bad"][name] = value
    choices.path.write_text(json.dumps(document))
    assert fresh().all() == {"good": OFF}
    document["entries"]["bad"] = value
    choices.path.write_text(json.dumps(document))
    assert fresh().all() == {"good": OFF}


def started(name: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", PROGRAM, name],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_processes_that_write_at_once_lose_nothing() -> None:
    running = [started(name) for name in "xyz"]
    for process in running:
        process.communicate()
        assert process.returncode == 0
    found = fresh().all()
    assert len(found) == 75 and found["y 24"] == Choice("kernel 24", time=25.0)


def test_a_writer_that_is_killed_leaves_a_whole_file() -> None:
    fresh().put("before", FAST)
    process = started("x")
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    found = fresh()
    assert found.get("before") == FAST and found.get("x 0") is not None
    found.put("after", OFF)  # its lock is gone with it
    assert fresh().get("after") == OFF


def test_old_files_go(folder: Path) -> None:
    folder.mkdir(parents=True)
    old = folder / "metal-0.json"
    old.write_text("{}")
    os.utime(old, (0, 0))
    fresh().put("a", FAST)
    assert not old.exists()


def test_a_folder_that_cannot_be_written_costs_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("in the way")
    choices = fresh()
    choices.put("a", FAST)
    choices.put("b", OFF)
    assert choices.all() == {"a": FAST, "b": OFF}
    assert len(caplog.records) == 1 and VARIABLE in caplog.text


def test_forget() -> None:
    choices = fresh()
    choices.put("a", FAST)
    choices.forget()
    assert choices.get("a") is None and fresh().get("a") is None
    choices.forget()
