"""Processes that tests start compute on MLX's CPU device, also where MLX itself takes a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# An MLX of a machine with a GPU.
CORE = (
    'cpu, gpu = "the CPU", "a GPU"\ndevice = gpu\ndef set_default_device(new):\n    global device\n    device = new\n'
)


def test_an_mlx_that_takes_a_gpu_by_itself(tmp_path: Path) -> None:
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "core.py").write_text(CORE)
    program = (
        "import sys\nassert 'mlx' not in sys.modules\nsys.path.insert(0, '.')\nfrom mlx import core\nprint(core.device)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stdout == "the CPU\n", done.stderr


def test_this_process_too() -> None:
    import mlx.core as mx

    assert mx.default_device() == mx.cpu
