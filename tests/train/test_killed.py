"""Processes that are killed, disks that fill, ranks that are lost: what was logged and saved is as if nothing had been."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.train.support import silent
from tests.train.tiny_runs import COMMANDS, ENDS, WROTE, go, log, prepare

ROOT = Path(__file__).resolve().parents[2]


def start(*words: object, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.train.tiny_runs", *map(str, words)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, **environment}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("runs")
    prepare(place)
    return place


@pytest.fixture(scope="module")
def ended(folder: Path) -> dict[str, str]:
    """How the processes of tiny_runs.killed ended."""
    with start("killed", folder) as process:
        out, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def whole(folder: Path) -> Any:
    """Runs that nothing stopped, of two batches a step, each taken once."""
    taken: dict[str, Path] = {}

    def find(command: str, optimizer: str) -> Path:
        name = f"whole-{command}-{optimizer}"
        if name not in taken:
            taken[name] = go(command, folder, name, silent, optimizer=optimizer, grad_accumulation_steps=2)
        return taken[name]

    return find


@pytest.mark.parametrize("optimizer", ENDS)
@pytest.mark.parametrize("command", COMMANDS)
def test_killed_and_resumed_is_the_same_to_the_bit(
    command: str, optimizer: str, folder: Path, ended: dict[str, str], whole: Any
) -> None:
    name = f"{command}-{optimizer}"
    assert ended[name] == "signal 9"
    assert not (folder / name / WROTE[command]).exists() or command == "lora"
    go(command, folder, name, silent, optimizer=optimizer, grad_accumulation_steps=2, resume=True)
    expected = whole(command, optimizer)
    assert log(folder / name) == log(expected) and len(log(expected)) == 5
    assert (folder / name / WROTE[command]).read_bytes() == (expected / WROTE[command]).read_bytes()


@pytest.mark.parametrize(("name", "file"), [("full", "step-00000004"), ("full-log", "log.jsonl")])
def test_a_full_disk_loses_nothing_before_the_last_checkpoint(
    name: str, file: str, folder: Path, ended: dict[str, str]
) -> None:
    assert f"{file} could not be written" in ended[name] and "Make room" in ended[name], ended[name]
    assert [p.name for p in (folder / name / "checkpoints").iterdir()] == ["step-00000002"]
    go("train", folder, name, silent, resume=True)
    assert log(folder / name) == log(go("train", folder, f"{name}-whole", silent))


def ring(folder: Path, what: str, how: str, ranks: int = 2) -> list[subprocess.Popen[str]]:
    """The first ranks of a ring of two, each a process."""
    sockets = [socket.socket() for _ in range(2)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    hosts = folder / f"hosts-{what}-{how}.json"
    hosts.write_text(json.dumps([["{}:{}".format(*s.getsockname())] for s in sockets]))
    for s in sockets:
        s.close()
    return [start(what, folder, how, MLX_RANK=str(rank), MLX_HOSTFILE=str(hosts)) for rank in range(ranks)]


def test_two_ranks_are_two_batches_a_step_and_a_dead_one_ends_the_other(folder: Path, whole: Any) -> None:
    first, second = ring(folder, "ranks", "SIGKILL")
    out, error = first.communicate(timeout=240)
    second.communicate()
    assert first.returncode == 0 and second.returncode == -9, error
    assert "rank 0 of 2 lost another rank" in json.loads(out.splitlines()[-1])["lost"]
    for command, optimizer in zip(COMMANDS, ENDS, strict=True):
        output, expected = folder / f"ring-{command}-0", whole(command, optimizer)
        assert log(output) == log(expected)
        assert (output / WROTE[command]).read_bytes() == (expected / WROTE[command]).read_bytes()
        assert not (folder / f"ring-{command}-1").exists()  # rank 0 alone writes
    # What two began, one ends.
    go("train", folder, "lost-SIGKILL-0", silent, resume=True, grad_accumulation_steps=2)
    assert log(folder / "lost-SIGKILL-0") == log(whole("train", "adamw"))


def test_a_silent_rank_and_one_that_never_comes_are_not_waited_for(folder: Path) -> None:
    first, second = ring(folder, "ranks", "SIGSTOP")
    [alone] = ring(folder, "alone", "", 1)
    for process, waited, codes in ((alone, "2 s", (-15,)), (first, "5 s", (1,))):
        _, error = process.communicate(timeout=240)
        assert process.returncode in codes and f"rank 0 waited {waited} for another rank" in error, error
    second.kill()
    second.communicate()
