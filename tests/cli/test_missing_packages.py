"""Commands where a package is missing: those that can do without it run, the others say at once what to install."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# pip leaves empty folders where mlx was, and Python takes those for a package without modules.
WITHOUT_MLX = """
import sys
from importlib.machinery import ModuleSpec
class NoMlx:
    def find_spec(self, name, path=None, target=None):
        if name == "mlx":
            spec = ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = []
            return spec
        if name.split(".")[0] in ("mlx", "mlx_lm"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, NoMlx())
"""
WITHOUT_LLGUIDANCE = "import sys\nsys.modules['llguidance'] = None\n"
MAIN = "from bitnet_mlx.cli.main import main\nsys.exit(main(sys.argv[1:]))"


def run(setting: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", setting + MAIN, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


@pytest.mark.parametrize(
    "arguments",
    [
        "generate --prompt x --max-tokens 2 --backend numpy", "memory --backend cpu", "inspect", "bench matmul --help",
        "bench decode --layers 1 --prompt 4 --tokens 2 --repeats 1 --backend numpy",
    ],
)  # fmt: skip
def test_what_needs_no_mlx_runs_without_it(arguments: str) -> None:
    done = run(WITHOUT_MLX, *arguments.split())
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_doctor_says_that_mlx_is_missing() -> None:
    code = WITHOUT_MLX + "from bitnet_mlx.doctor import machine\nprint(machine._chip(), machine.missing('mlx'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "the package mlx is not installed" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        "train --data FILE --output DIR", "qat --model DIR --data FILE --output DIR", "lora --train --data DIR",
        "generate --prompt x --backend mlx", "bench decode --backend mlx",
    ],
)  # fmt: skip
def test_what_needs_mlx_says_so(arguments: str, tmp_path: Path) -> None:
    (tmp_path / "FILE").write_text("import this\n")
    (tmp_path / "DIR").mkdir()
    done = run(WITHOUT_MLX, *arguments.split(), cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "mlx is not installed" in done.stderr.replace("MLX is needed, and", "mlx"), done.stderr
    assert "unexpected" not in done.stderr and "Traceback" not in done.stderr


def test_a_schema_without_its_library_is_refused_before_anything_is_loaded() -> None:
    done = run(WITHOUT_LLGUIDANCE, "generate", "--prompt", "x", "--json-schema", "{}", "--model", "/nowhere")
    assert done.returncode == 2
    assert "pip install 'bitnet-mlx[serve]'" in done.stderr
