"""Streams that are closed, or that lack letters, stop no command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import hf_folder

GENERATE = "generate --prompt x --max-tokens 2 --backend numpy"


def closed(line: str, *which: int, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A command whose streams of these numbers are closed, as the shell's `>&-` closes them."""
    close = "; ".join(f"os.close({number})" for number in which)
    start = f"import os, sys; {close}; os.execv(sys.executable, [sys.executable, '-m', 'bitnet_mlx', *sys.argv[1:]])"
    command = [sys.executable, "-c", start, *line.split()]
    return subprocess.run(command, capture_output=True, env={**os.environ, **environment}, check=False)


@pytest.mark.parametrize("line", [GENERATE, f"{GENERATE} --json", "inspect", "--help"])
@pytest.mark.parametrize("which", [(1,), (2,), (0, 1, 2)])
def test_closed_streams(line: str, which: tuple[int, ...]) -> None:
    done = closed(line, *which)
    assert done.returncode == 0, done.stderr
    assert b"unexpected" not in done.stderr
    assert bool(done.stdout) == (1 not in which)


def test_a_closed_stdin_is_an_empty_one() -> None:
    done = closed("generate --prompt - --backend numpy", 0)
    assert done.returncode == 2 and b"the prompt is empty" in done.stderr


def test_letters_that_stdout_lacks(tmp_path: Path) -> None:
    """A model's path is not the terminal's fault."""
    folder = tmp_path / "modèle 你"
    hf_folder.write(folder)
    run = [sys.executable, "-m", "bitnet_mlx", "inspect", str(folder)]
    plain = subprocess.run(run, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, check=True)
    assert rb"mod\xe8le \u4f60" in plain.stdout
    record = subprocess.run([*run, "--json"], capture_output=True, check=True)
    assert json.loads(record.stdout)["path"] == str(folder)
