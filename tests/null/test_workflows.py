"""What the workflows run is there, and what fails in them is seen."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from bitnet_mlx.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def steps(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(the shell's name or "", step) of every command."""
    flow = yaml.safe_load(path.read_text(encoding="utf-8"))
    found = []
    for job in flow["jobs"].values():
        shell = {**flow.get("defaults", {}).get("run", {}), **job.get("defaults", {}).get("run", {})}.get("shell", "")
        found += [(step.get("shell", shell), step) for step in job["steps"] if "run" in step]
    return found


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_commands_are_there_and_pipes_fail_with_their_parts(path: Path) -> None:
    """GitHub's own choice of a shell, `bash -e`, takes a pipe's last exit code; only `shell: bash` adds pipefail."""
    assert steps(path)
    for shell, step in steps(path):
        command = step["run"]
        assert "|" not in command or shell == "bash", command
        for script in re.findall(r"(?:^|\s)(?:\./)?(scripts/\w+|\.ci/\w+)", command):
            assert os.access(ROOT / script, os.X_OK), script
        for name in re.findall(r"bin/bitnet-mlx (\S+)", command):
            assert name in COMMANDS, command
