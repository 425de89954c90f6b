"""What may be imported when: each case in a fresh interpreter."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_MLX = """
import sys
class NoMlx:
    def find_spec(self, name, path=None, target=None):
        if name == "mlx" or name.startswith("mlx."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, NoMlx())
"""
MAKE_MODEL = """
from tests.support.random_model import random_weights, tiny_config
from bitnet_mlx.models.decoder_mlx import MlxModel
model = MlxModel(random_weights(tiny_config()))
"""


def python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_package_imports_without_mlx_and_its_mlx_backend_says_what_to_install() -> None:
    code = """
import bitnet_mlx, bitnet_mlx.nn, bitnet_mlx.models, bitnet_mlx.backends
import bitnet_mlx.models.decoder_numpy
from bitnet_mlx.errors import BackendError
for name in ("models.decoder_mlx", "models.cache_mlx", "models.rope_mlx", "nn.bitlinear", "nn.dense", "nn.norm",
             "backends.mlx_affine"):
    try:
        __import__("bitnet_mlx." + name)
    except BackendError as error:
        assert "needs MLX" in str(error) and "install mlx" in str(error), error
        print("refused", name)
"""
    assert python(WITHOUT_MLX + code).count("refused") == 7


def test_plain_generation_imports_neither_mlx_lm_nor_transformers() -> None:
    code = """
import sys
cache = model.make_cache()
tokens = [1, 2, 3]
for _ in range(5):
    tokens = [int(model.step([tokens], [cache])[0].argmax())]
heavy = {name.split(".")[0] for name in sys.modules} & {"mlx_lm", "transformers", "torch", "numba"}
assert not heavy, heavy
print("ok")
"""
    assert python(MAKE_MODEL + code) == "ok\n"


def test_importing_the_layers_makes_no_stream_and_leaves_the_default_device() -> None:
    code = """
import mlx.core as mx
calls = []
for name in ("set_default_device", "set_default_stream", "new_stream", "new_thread_local_stream"):
    if hasattr(mx, name):
        setattr(mx, name, lambda *a, name=name: calls.append(name))
"""
    after = "\nmodel.step([[1, 2]], [model.make_cache()])\nassert not calls, calls\nprint('ok')\n"
    assert python(code + MAKE_MODEL + after) == "ok\n"


def test_only_one_file_imports_mlx_lm() -> None:
    found = set()
    for path in (ROOT / "bitnet_mlx").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.append(node.module)
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                names.append(ast.unparse(node.args[0]).strip("f'\""))
            if any(name.split(".")[0] == "mlx_lm" for name in names):
                found.add(path.relative_to(ROOT).as_posix())
    assert found == {"bitnet_mlx/_mlxlm.py"}
