"""The scripts: from any folder, with spaces in the path, and what they say when they cannot go on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
ECHO = "import sys\nprint(__file__, *sys.argv[1:], sep='|')\n"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The scripts beside a package of one file that prints its arguments; .venv links to this very environment."""
    root = tmp_path / "a clone"
    shutil.copytree(ROOT / "scripts", root / "scripts")
    (root / "bitnet_mlx").mkdir()
    (root / "bitnet_mlx" / "__main__.py").write_text(ECHO)
    (root / ".venv").symlink_to(sys.prefix)
    return root


def run(script: Path, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run([str(script), *arguments], capture_output=True, text=True, cwd=cwd, env=env)


def test_demo_generates_from_any_folder(clone: Path, tmp_path: Path) -> None:
    done = run(clone / "scripts" / "demo", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1].split("|")
    assert last[0].startswith(str(clone)) and last[1] == "generate" and last[-1] == "--json"
    assert "def read_config(path):" in last


def test_test_passes_arguments_to_pytest(clone: Path, tmp_path: Path) -> None:
    (clone / "test_one.py").write_text("def test_one(): ...\n")
    done = run(clone / "scripts" / "test", "-n", "0", "-k", "one", cwd=tmp_path)
    assert done.returncode == 0 and "1 passed" in done.stdout


def test_no_test_found_is_a_failure(clone: Path, tmp_path: Path) -> None:
    assert run(clone / "scripts" / "test", cwd=tmp_path).returncode == 5


@pytest.mark.parametrize("status", [0, 3])
def test_ci_runs_both_scripts_and_fails_if_one_does(tmp_path: Path, status: int) -> None:
    (tmp_path / "scripts").mkdir()
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    for name, code in (("check", status), ("test", 0)):
        script = tmp_path / "scripts" / name
        script.write_text(f"#!/bin/sh\necho {name} ran\nexit {code}\n")
        script.chmod(0o755)
    done = run(Path("/bin/sh"), "-c", 'exec bash "$0"', str(tmp_path / ".ci" / "run"), cwd=tmp_path)
    assert done.stdout == "check ran\ntest ran\n"
    assert done.returncode == bool(status)


def test_without_a_usable_python_the_demo_says_what_to_do(clone: Path, tmp_path: Path) -> None:
    (clone / ".venv").unlink()
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("sh", "dirname"):
        (tools / name).symlink_to(str(shutil.which(name)))
    done = run(clone / "scripts" / "demo", cwd=tmp_path, PATH=str(tools), PYTHON="no-such-python")
    assert done.returncode == 1 and not (clone / ".venv").exists()
    assert "3.10 to 3.14" in done.stderr and "PYTHON=" in done.stderr


@pytest.fixture
def setup(tmp_path: Path) -> ModuleType:
    spec = spec_from_file_location("_venv", ROOT / "scripts" / "_venv.py")
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    return module


def test_a_foreign_folder_named_venv_is_left_alone(setup: ModuleType, tmp_path: Path) -> None:
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "notes").write_text("mine")
    with pytest.raises(SystemExit, match="is not a virtual environment"):
        setup.main(tmp_path, set())
    assert (tmp_path / ".venv" / "notes").read_text() == "mine"


def test_installed_is_what_the_stamp_says_until_pyproject_changes(setup: ModuleType, tmp_path: Path) -> None:
    environment = setup.Environment(tmp_path)
    assert environment.installed() == set()
    environment.folder.mkdir()
    record = {"fingerprint": setup.fingerprint(tmp_path), "extras": ["", "test"]}
    environment.stamp.write_text(json.dumps(record))
    assert environment.installed() == {"", "test"}
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    assert environment.installed() == set()
    environment.stamp.write_text('{"finger')
    assert environment.installed() == set()


def test_a_broken_environment_does_not_work(setup: ModuleType, tmp_path: Path) -> None:
    environment = setup.Environment(tmp_path)
    assert not environment.works()
    environment.python.parent.mkdir(parents=True)
    environment.python.symlink_to(tmp_path / "gone")
    assert not environment.works()
    environment.python.unlink()
    environment.python.symlink_to("/bin/false" if Path("/bin/false").exists() else "/usr/bin/false")
    assert not environment.works()


@pytest.mark.parametrize(
    ("library", "told"),
    [
        (("glibc", "2.34"), "glibc 2.34"),
        (("", ""), "another C library"),
        (("glibc", "2.35"), ""),
        (("glibc", "2.40.1"), ""),
    ],
)
def test_an_old_c_library_is_told(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, library: tuple[str, str], told: str
) -> None:
    monkeypatch.setattr(setup.sys, "platform", "linux")
    monkeypatch.setattr(setup.platform, "libc_ver", lambda: library)
    reason = setup.unsupported()
    assert told in reason if told else not reason
